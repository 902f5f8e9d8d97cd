"""Texts to packed rows: as transformers writes pairs, every token once, no text in two rows."""

import json

import numpy as np
import pytest
from tiny_texts import make_texts

from jaxdistill.tasks import Rows, TaskTokens, encode_rows, packed_batch, row_length
from jaxdistill.tasks.tokens import pack, truncated


def rows_of(*columns: list[str]) -> Rows:
    return Rows(columns, np.arange(len(columns[0]), dtype=np.int32) % 2)


def test_pairs_of_bert_by_hand(tokenizer):
    words = tokenizer.encode(["river stone", "light"])
    tokens = encode_rows(rows_of(["river stone"], ["light"]), tokenizer, "bert", 32)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert tokens.ids[0].tolist() == [cls, *words[0], sep, *words[1], sep]
    assert tokens.types[0].tolist() == [0] * (len(words[0]) + 2) + [1] * (len(words[1]) + 1)


def test_pairs_of_roberta_have_two_separators_and_one_type(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["bpe"]
    words = tokenizer.encode(["river stone", "light"])
    tokens = encode_rows(rows_of(["river stone"], ["light"]), tokenizer, "roberta", 32)
    assert tokens.ids[0].tolist() == [0, *words[0], 2, 2, *words[1], 2]
    assert set(tokens.types[0].tolist()) == {0}


@pytest.mark.parametrize("max_length", [9, 16, 64])
@pytest.mark.parametrize("pairs", [False, True])
def test_cut_as_transformers_cuts(tokenizer_folders, tokenizer, pairs, max_length):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folders["wordpiece"])
    columns = [make_texts(30, seed=1, longest=20), make_texts(30, seed=2, longest=20)][: 1 + pairs]
    ours = encode_rows(rows_of(*columns), tokenizer, "bert", max_length)
    assert any(len(ids) == max_length for ids in ours.ids) or max_length == 64
    reference = theirs(*columns, truncation=True, max_length=max_length)
    assert [ids.tolist() for ids in ours.ids] == reference["input_ids"]
    if pairs:  # this backend has no types for a template without them; by hand above
        assert all(types[0] == 0 and types[-1] == 1 for types in ours.types)


def test_truncation_keeps_all_the_room_it_has():
    for first in range(0, 40):
        for second in range(0, 40):
            kept = truncated(first, second, 17)
            assert sum(kept) == min(17, first + second) and kept[0] <= first and kept[1] <= second


def test_rows_are_filled_longest_first():
    rows, starts, count = pack([3, 5, 2, 4, 6], 8)
    assert count == 3
    assert list(zip(rows.tolist(), starts.tolist(), strict=True)) == [(1, 5), (1, 0), (0, 6), (2, 0), (0, 0)]


def test_a_packed_batch_holds_every_token_once():
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 90, size).astype(np.int32) for size in rng.integers(3, 20, 30)]
    types = [rng.integers(0, 2, len(each)).astype(np.int32) for each in ids]
    tokens = TaskTokens(ids, types, np.arange(30, dtype=np.int32))
    chosen = rng.permutation(30)[:13]
    batch = packed_batch(tokens, chosen, length=32, num_examples=16, row_step=4)
    assert batch["input_ids"].shape[0] % 4 == 0 and batch["weight"].tolist() == [1.0] * 13 + [0.0] * 3
    assert batch["labels"][:13].tolist() == chosen.tolist()
    assert (batch["segment_ids"] > 0).sum() == sum(len(ids[i]) for i in chosen)
    for place, example in enumerate(chosen):
        row, slot = batch["row"][place], batch["slot"][place]
        segment = batch["segment_ids"][row, slot]
        own = batch["segment_ids"][row] == segment
        assert np.flatnonzero(own)[0] == slot
        assert batch["input_ids"][row, own].tolist() == ids[example].tolist()
        assert batch["token_type_ids"][row, own].tolist() == types[example].tolist()
    assert len(packed_batch(tokens, chosen, length=32, num_examples=16, row_step=4, num_rows=12)["input_ids"]) == 12


@pytest.mark.parametrize(
    ("longest", "limit", "expected"), [(20, 512, 32), (33, 512, 64), (128, 512, 128), (500, 512, 512), (60, 62, 62), (600, 700, 600)]
)
def test_row_length(longest, limit, expected):
    assert row_length(longest, limit) == expected


def test_texts_cannot_spell_special_tokens(tokenizer):
    tokens = encode_rows(rows_of([json.dumps("a [SEP] b")]), tokenizer, "bert", 64)
    assert (tokens.ids[0] == tokenizer.sep_id).sum() == 1
