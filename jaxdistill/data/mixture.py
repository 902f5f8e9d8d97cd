"""How sources and languages share the rows that training draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.config import DataConfig
from jaxdistill.data.order import RowOrder, shares


def languages(data: DataConfig) -> dict[str, list[int]]:
    """What the rows are counted by, and its sources: their languages, or each source by itself; nothing where there is only one."""
    found: dict[str, list[int]] = {}
    for i, source in enumerate(data.sources or ()):
        found.setdefault(source.language or f"source_{i}", []).append(i)
    return found if len(found) > 1 else {}


def exponent_weights(rows: Sequence[int], exponent: float) -> list[float]:
    """Weights of languages: (share of the rows) ** exponent. 1 keeps the shares, 0 makes all alike; no rows, no weight.

    Conneau and Lample 2019 (XLM, section 3.1; 0.5 there), Conneau et al. 2020 (XLM-R: 0.3).
    """
    total = sum(rows)
    return [(count / total) ** exponent if count else 0.0 for count in rows]


@dataclass(frozen=True)
class LanguageShare:
    """Rows of a language in the text, and how many of them an epoch (of as many rows as the text has) draws."""

    name: str
    rows: int
    drawn: int


def language_shares(data: DataConfig, rows_per_source: Sequence[int]) -> list[LanguageShare]:
    """Of every language, in the order of the config; nothing where there is only one."""
    pools = languages(data)
    rows = drawn = [sum(rows_per_source[i] for i in pool) for pool in pools.values()]
    if weights := _weights(data):
        counts = shares(sum(rows_per_source), weights)
        drawn = [sum(counts[i] for i in pool) for pool in pools.values()]
    elif data.sampling_exponent is not None:
        drawn = shares(sum(rows), exponent_weights(rows, data.sampling_exponent))
    return [LanguageShare(*each) for each in zip(pools, rows, drawn, strict=True)]


def _weights(data: DataConfig) -> list[float] | None:
    weights = [source.weight for source in data.sources or ()]
    return None if not weights or None in weights else weights


def row_order(data: DataConfig, rows_per_source: Sequence[int], seed: int) -> RowOrder:
    """The order in which a run reads its rows.

    Raises:
      InputError: nothing to read, or a source with a weight of which an epoch would draw nothing.
    """
    if data.sampling_exponent is None:
        return RowOrder(rows_per_source, _weights(data), seed)
    rows = {name: sum(rows_per_source[i] for i in pool) for name, pool in languages(data).items()}
    there = {name: count for name, count in rows.items() if count}  # a language whose text is all held out has no share
    pools = [languages(data)[name] for name in there]
    return RowOrder(rows_per_source, exponent_weights(list(there.values()), data.sampling_exponent), seed, pools)


def language_numbers(data: DataConfig, rows_per_source: Sequence[int], row_numbers: np.ndarray) -> np.ndarray:
    """The number of each row's language in `languages(data)`, int32 [n]."""
    of_source = np.empty(len(rows_per_source), np.int32)
    for number, pool in enumerate(languages(data).values()):
        of_source[pool] = number
    return of_source[np.searchsorted(np.cumsum(rows_per_source), row_numbers, side="right")]


def language_tokens(num_languages: int, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{"languages": real tokens of each language in a global batch, int32 [num_languages]}; nothing where none are counted. On the device.

    Args:
      batch: segment_ids [A, B, S], 0 = padding; languages [A, B], the number of each row's.
    """
    if not num_languages:
        return {}
    own = jax.nn.one_hot(batch["languages"], num_languages, dtype=jnp.int32)
    return {"languages": jnp.sum(jnp.sum(batch["segment_ids"] > 0, axis=-1)[..., None] * own, axis=(0, 1))}
