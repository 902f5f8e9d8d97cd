"""The rows that teacher and student are compared on: paragraphs of their natural lengths, the same ones at every run."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdistill.config import SourceConfig
from jaxdistill.data import DocumentCounts, TextTokenizer, is_held_out, read_documents, read_labelled
from jaxdistill.errors import InputError

SHORTEST_PARAGRAPH = 20  # characters: below are headings and list marks
MOST_CHARACTERS = 64 << 20  # read of a source: the sample is of its beginning where it is longer
FEWEST_ROWS = 3  # the similarities of fewer rows have no ranking
ALL = ""  # the language of every row, of a text without a language column


@dataclass(frozen=True)
class Rows:
    """`[CLS] paragraph [SEP]` each, sorted by language and then by length."""

    input_ids: np.ndarray  # int32 [N, S]
    attention_mask: np.ndarray  # int32 [N, S], 1 = real token
    languages: tuple[str, ...]  # of each row

    @property
    def lengths(self) -> np.ndarray:
        return self.attention_mask.sum(axis=1)


def paragraphs(source: SourceConfig, *, held_out: float | None, language_column: str | None) -> Iterator[tuple[str, str]]:
    """(language, paragraph): the lines of the documents; `held_out`: of those documents alone that training leaves out."""
    if language_column is None:
        documents: Iterable[tuple[str, str]] = ((ALL, text) for text in read_documents(source, DocumentCounts()))
    else:
        documents = read_labelled(source, language_column)
    num_characters = 0
    for language, document in documents:
        num_characters += len(document)
        if num_characters > MOST_CHARACTERS:
            return
        if held_out is not None and not is_held_out(document.encode(), held_out):
            continue
        for line in document.splitlines():
            if len(line.strip()) >= SHORTEST_PARAGRAPH:
                yield language, line.strip()


def sample(found: Iterable[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """`limit` different paragraphs, as many of each language as there are; those of the smallest hashes, so that order is no matter.

    Raises:
      InputError: fewer rows than languages.
    """
    heaps: dict[str, list[tuple[int, str]]] = {}
    kept: set[tuple[str, int]] = set()
    for language, text in found:
        number = -int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        heap = heaps.setdefault(language, [])
        if (language, number) in kept or (len(heap) == limit and number < heap[0][0]):
            continue
        kept.add((language, number))
        if len(heap) < limit:
            heapq.heappush(heap, (number, text))
        else:
            kept.discard((language, heapq.heappushpop(heap, (number, text))[0]))
    if len(heaps) > limit:
        raise InputError(f"--rows: {limit} rows are fewer than the {len(heaps)} languages of the text; take at least {len(heaps)}")
    by_language = {language: sorted(heaps[language], reverse=True) for language in sorted(heaps)}
    turns = ((turn, language) for turn in range(limit) for language in by_language)
    chosen = [(language, by_language[language][turn][1]) for turn, language in turns if turn < len(by_language[language])]
    return chosen[:limit]


def text_rows(
    sources: Sequence[SourceConfig],
    tokenizer: TextTokenizer,
    *,
    held_out: float | None = None,
    language_column: str | None = None,
    limit: int = 256,
    length: int = 128,
) -> Rows:
    """Up to `limit` rows of at most `length` tokens.

    Raises:
      InputError: a source that cannot be read, without the language column, or too little text.
    """
    found = (pair for source in sources for pair in paragraphs(source, held_out=held_out, language_column=language_column))
    chosen = sample(found, limit)
    if len(chosen) < FEWEST_ROWS:
        where = ", ".join(str(source.path or source.dataset) for source in sources)
        part = "" if held_out is None else f" in the held-out part ({held_out:g} of the documents)"
        raise InputError(
            f"{where}: {len(chosen)} paragraphs of at least {SHORTEST_PARAGRAPH} characters{part}; at least {FEWEST_ROWS} are needed: "
            f"give another --text"
        )
    encoded = [ids[: length - 2] for ids in tokenizer.encode([text for _, text in chosen])]
    order = sorted(range(len(chosen)), key=lambda i: (chosen[i][0], len(encoded[i]), i))
    ids = np.full((len(chosen), length), tokenizer.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, i in enumerate(order):
        tokens = [tokenizer.cls_id, *encoded[i].tolist(), tokenizer.sep_id]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return Rows(ids, mask, tuple(chosen[i][0] for i in order))
