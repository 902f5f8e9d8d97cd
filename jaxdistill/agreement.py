"""What a student keeps of its teacher, measured on text that neither was trained on here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import TextTokenizer
from jaxdistill.features import Feature
from jaxdistill.models import EncoderConfig, forward
from jaxdistill.shapes import Array, Float, Int

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def split_sentences(documents: Iterable[str], *, limit: int, num_chars: tuple[int, int] = (40, 300)) -> list[str]:
    """Up to `limit` different sentences of a length within `num_chars`, as many of each document as there are, in order."""
    found: dict[str, None] = {}
    for document in documents:
        for line in document.splitlines():
            for sentence in _SENTENCE_END.split(line.strip()):
                if num_chars[0] <= len(sentence) <= num_chars[1] and sentence[-1] in ".!?":
                    found.setdefault(sentence)
                if len(found) == limit:
                    return list(found)
    return list(found)


def sentence_embeddings(
    config: EncoderConfig, params: dict, tokenizer: TextTokenizer, sentences: list[str], *, max_length: int = 96, batch_size: int = 32
) -> Float[np.ndarray, "N D"]:
    """Mean of the last hidden state over the real tokens of each sentence, cut at `max_length` tokens (at most its positions)."""
    max_length = min(max_length, config.max_sequence_length)
    ids = np.full((len(sentences), max_length), tokenizer.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(tokenizer.encode(sentences)):
        tokens = [tokenizer.cls_id, *tokens[: max_length - 2].tolist(), tokenizer.sep_id]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    embed = jax.jit(partial(_mean_hidden, config))
    device_params, rows = jax.device_put(params), []
    for start in range(0, len(sentences), batch_size):
        batch = [np.resize(x[start : start + batch_size], (batch_size, max_length)) for x in (ids, mask)]  # one shape, one compilation
        rows.append(np.asarray(embed(device_params, *batch)))
    return np.concatenate(rows)[: len(sentences)]


def _mean_hidden(config: EncoderConfig, params: dict, ids: Int[Array, "B S"], mask: Int[Array, "B S"]) -> Float[Array, "B D"]:
    last = Feature("hidden", config.num_layers)
    hidden = forward(config, params, ids, mask, features=frozenset([last]))[last]
    weights = mask.astype(jnp.float32)[..., None]
    return jnp.sum(hidden * weights, axis=1) / jnp.sum(weights, axis=1)


def similarity_agreement(teacher: Float[np.ndarray, "N Dt"], student: Float[np.ndarray, "N Ds"]) -> float:
    """Spearman's correlation between the two models' cosine similarities of all pairs of sentences; 1: the same ranking."""
    from scipy.stats import spearmanr

    def similarities(embeddings: np.ndarray) -> np.ndarray:
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return (unit @ unit.T)[np.triu_indices(len(unit), k=1)]

    return float(spearmanr(similarities(teacher), similarities(student)).statistic)


def linear_cka(student: Float[np.ndarray, "N Ds"], teacher: Float[np.ndarray, "N Dt"]) -> float:
    """Linear centred kernel alignment of two sets of vectors of the same N tokens (Kornblith et al. 2019, eq. 5); 1: equal up to
    rotation and scale."""
    x, y = (vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64) for vectors in (student, teacher))
    return float(np.sum((x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def explained_variance(student: Float[np.ndarray, "N Ds"], teacher: Float[np.ndarray, "N Dt"]) -> float:
    """Share of the teacher's variance that a linear map of the student's vectors explains (R^2).

    Fitted by least squares on the first half of the rows and measured on the second, so that width alone earns nothing.
    """
    half = len(student) // 2
    x, y = student.astype(np.float64), teacher.astype(np.float64)
    mean_x, mean_y = x[:half].mean(axis=0), y[:half].mean(axis=0)
    gram = (x[:half] - mean_x).T @ (x[:half] - mean_x)
    gram += 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))  # a direction that the student never uses would make it singular
    weights = np.linalg.solve(gram, (x[:half] - mean_x).T @ (y[:half] - mean_y))
    residual = y[half:] - mean_y - (x[half:] - mean_x) @ weights
    return float(1 - np.sum(residual**2) / np.sum((y[half:] - y[half:].mean(axis=0)) ** 2))
