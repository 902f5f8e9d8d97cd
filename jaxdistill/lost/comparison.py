"""Teacher and student on the same rows, batch by batch on the device; what grows with the text is a few numbers for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import NOT_PREDICTED, Masking, mask_tokens
from jaxdistill.features import Feature, all_features
from jaxdistill.losses.relations import log_relations, visible_pairs
from jaxdistill.lost.moments import batch_moments, cka, debiased_cka, group_sums, merged
from jaxdistill.models import EncoderConfig, forward, mlm_logits
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Bool, Float, Int, Num

RELATIONS = ("query", "key", "value")
MOST_RELATION_HEADS = 12
BATCH_SLOTS = 4 * 128 * 128  # rows x length x length of a batch: 12 layers of 12 heads are 38 MB, and about 20 such arrays live
PLACES = 128  # masked places whose logits are there at once: 128 MB of XLM-R's vocabulary
MLM_COUNTS = ("places", "top1", "top5", "teacher_right", "student_right")

Groups = Sequence[Sequence[str]]  # the groups that each row belongs to


class Model(NamedTuple):
    config: EncoderConfig
    params: dict


@dataclass
class Measured:
    """Of N rows: sums over the real queries of a row unless it says otherwise. Ls, Lt layers; Ns, Nt heads; R relation heads."""

    cka: np.ndarray  # [Ls + 1, Lt + 1], all rows together
    group_cka: dict[str, float | None]  # last layers, debiased
    overlap: np.ndarray  # [N, Ls, Ns, Lt, Nt], of attention
    uniform: np.ndarray  # [N, Lt, Nt], overlap of the teacher's attention with attention that is equal on all keys
    relation_overlap: np.ndarray  # [N, 3, R, Ls, Lt]
    relation_kl: np.ndarray  # the same, nats
    sentences: dict[str, tuple[np.ndarray, np.ndarray]]  # cls and mean: (student, teacher) [N, D]
    mlm: np.ndarray | None  # [N, 5], MLM_COUNTS; None without heads


def relation_heads(student: EncoderConfig, teacher: EncoderConfig) -> int:
    """The most relation heads, up to 12, that divide both hidden sizes."""
    both = gcd(student.hidden_size, teacher.hidden_size)
    return max(heads for heads in range(1, MOST_RELATION_HEADS + 1) if both % heads == 0)


def overlap(a: Float[Array, "B I Q K"], b: Float[Array, "B J Q K"]) -> Float[Array, "B I J"]:
    """1 - total variation of distributions over keys, summed over queries, for each pair of heads: sum of min(a, b).

    0: no key in common, 1 a query: equal. A query of zeros counts 0.
    """
    return jnp.sum(jnp.minimum(a[:, :, None], b[:, None]), axis=(-1, -2))


def log_attention(
    output: Any, config: EncoderConfig, visible: Bool[Array, "B 1 1 S"], kinds: tuple[str, str], heads: int
) -> Float[Array, "B LN S S"]:
    """Log-probabilities of all layers one after the other, `heads` of each layer."""
    layers = range(1, config.num_layers + 1)
    found = [log_relations(*(output[Feature(kind, layer)] for kind in kinds), visible, heads) for layer in layers]
    return jnp.concatenate(found, axis=1)


def compare_relations(
    student: Float[Array, "B I S S"],
    teacher: Float[Array, "B J S S"],
    real: Float[Array, "B 1 S 1"],
    visible: Bool[Array, "B 1 1 S"],
    heads: int,
) -> tuple[Float[Array, "B R Ls Lt"], Float[Array, "B R Ls Lt"]]:
    """(overlap, KL(teacher || student) in nats) of each relation head between all pairs of layers, from log-probabilities."""

    def by_head(log):  # [B, L * R, S, S] -> [B * R, L, S, S]
        batch, both, *rest = log.shape
        return log.reshape(batch, both // heads, heads, *rest).swapaxes(1, 2).reshape(batch * heads, both // heads, *rest)

    student_log, teacher_log = (by_head(jnp.where(visible, log, 0.0)) for log in (student, teacher))
    student_p, teacher_p = (by_head(jnp.where(visible, jnp.exp(log), 0.0) * real) for log in (student, teacher))
    negative_entropy = jnp.einsum("bjqk,bjqk->bj", teacher_p, teacher_log)
    kl = negative_entropy[:, None, :] - jnp.einsum("bjqk,biqk->bij", teacher_p, student_log)
    shape = (student.shape[0], heads, *kl.shape[1:])
    return overlap(student_p, teacher_p).reshape(shape), kl.reshape(shape)


def compare_batch(
    student_config: EncoderConfig,
    teacher_config: EncoderConfig,
    heads: int,
    student_params: dict,
    teacher_params: dict,
    ids: Int[Array, "B S"],
    mask: Num[Array, "B S"],
) -> dict[str, Any]:
    """Everything of one batch but the MLM heads: moments, the last hidden states, and the fields of `Measured` by row."""
    configs = (student_config, teacher_config)
    outputs = [
        forward(config, params, ids, mask, features=all_features(range(config.num_layers + 1)))
        for config, params in zip(configs, (student_params, teacher_params), strict=True)
    ]
    hidden = [
        jnp.stack([output.hidden[i] for i in range(config.num_layers + 1)], 2) for output, config in zip(outputs, configs, strict=True)
    ]
    visible, real = visible_pairs(mask, None), (mask > 0).astype(jnp.float32)[:, None, :, None]
    attention = [
        jnp.exp(log_attention(output, config, visible, ("query", "key"), config.num_heads)) * real
        for output, config in zip(outputs, configs, strict=True)
    ]
    num_layers, num_heads = [config.num_layers for config in configs], [config.num_heads for config in configs]
    even = jnp.where(visible, real / jnp.maximum(jnp.sum(real, axis=2, keepdims=True), 1.0), 0.0)
    relations = []
    for kind in RELATIONS:
        logs = [log_attention(output, config, visible, (kind, kind), heads) for output, config in zip(outputs, configs, strict=True)]
        relations.append(compare_relations(*logs, real, visible, heads))
    weights = real[:, 0] / jnp.maximum(jnp.sum(real[:, 0], axis=1, keepdims=True), 1.0)
    last = [states[:, :, -1] for states in hidden]
    return {
        "moments": batch_moments(*hidden, mask),
        "last": last,
        "overlap": overlap(*attention).reshape(-1, num_layers[0], num_heads[0], num_layers[1], num_heads[1]),
        "uniform": overlap(even, attention[1]).reshape(-1, num_layers[1], num_heads[1]),
        "relation_overlap": jnp.stack([both[0] for both in relations], 1),
        "relation_kl": jnp.stack([both[1] for both in relations], 1),
        "cls": [states[:, 0] for states in last],
        "mean": [jnp.sum(states * weights, axis=1) for states in last],
    }


def batch_rows(length: int) -> int:
    return max(1, min(64, BATCH_SLOTS // length**2))


def _batches(arrays: Sequence[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """One shape for all, so that there is one compilation: the last batch is filled up with rows of padding (zeros)."""
    size = batch_rows(length)
    pad = -len(arrays[0]) % size
    padded = [np.pad(x, ((0, pad), (0, 0))) for x in arrays]
    return [[x[i : i + size] for x in padded] for i in range(0, len(padded[0]), size)]


def measure(
    student: Model, teacher: Model, ids: np.ndarray, mask: np.ndarray, groups: Groups, *, progress: Callable[..., None] | None = None
) -> Measured:
    """Compare the two on rows [N, S]; `groups` name the breakdowns that each row counts in.

    Args:
      progress: as `progress.preparing` yields it; a row is a document, and its bytes.
    """
    compare = jax.jit(partial(compare_batch, student.config, teacher.config, relation_heads(student.config, teacher.config)))
    merge = jax.jit(merged, donate_argnums=0)
    params = [{part: model.params[part] for part in ("embeddings", "layers")} for model in (student, teacher)]
    params = jax.device_put(params)
    moments, pivot, sums, by_row = None, None, {}, []
    for number, (batch_ids, batch_mask) in enumerate(_batches((ids, mask), ids.shape[1])):
        found = compare(*params, batch_ids, batch_mask)
        own, last = found.pop("moments"), found.pop("last")
        # One shift for all batches; which one is no matter to the result.
        pivot = pivot or [own["mean_x"][-1], own["mean_y"][-1]]
        last = [states - shift[None, None] for states, shift in zip(last, pivot, strict=True)]
        start = number * len(batch_ids)
        for group in dict.fromkeys(name for names in groups[start : start + len(batch_ids)] for name in names):
            member = np.array([[group in names] for names in groups[start : start + len(batch_ids)]])
            member = np.pad(member, ((0, len(batch_ids) - len(member)), (0, 0)))
            one = group_sums(*last, batch_mask * member)
            sums[group] = jax.tree.map(jnp.add, sums[group], one) if group in sums else one
        moments = own if moments is None else merge(moments, own)
        by_row.append(jax.tree.map(np.asarray, found))
        if progress is not None:
            done = min(start + len(batch_ids), len(ids))
            progress(documents=done, tokens=int(mask[:done].sum()), bytes_done=done, bytes_total=len(ids))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(ids)], *by_row)
    sentences = {kind: tuple(rows.pop(kind)) for kind in ("cls", "mean")}
    group_cka = {group: debiased_cka(each) for group, each in sums.items()}
    return Measured(cka=np.asarray(cka(moments)), group_cka=group_cka, sentences=sentences, mlm=None, **rows)


def masked_rows(ids: np.ndarray, mask: np.ndarray, masking: Masking) -> tuple[np.ndarray, np.ndarray]:
    """(masked ids, labels) by BERT's scheme; the same at every run, and of a row whatever its neighbours are."""
    keys = RowKeys.create(jax.random.key(0), jnp.arange(len(ids), dtype=jnp.uint32))
    masked, labels = mask_tokens(keys, jnp.asarray(ids), jnp.asarray(mask), masking)
    return np.asarray(masked), np.asarray(labels)


def measure_mlm(student: Model, teacher: Model, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """[N, 5] counts of the masked places of each row (MLM_COUNTS): how many there are; where the teacher's first guess is the
    student's first, and among its first five; where each one's first guess is the word itself."""
    models = [model._replace(params=jax.device_put(model.params)) for model in (student, teacher)]
    encoders = [jax.jit(partial(_last_hidden, model.config)) for model in models]
    judge = jax.jit(partial(_judge, student.config, teacher.config, vocab_size))
    counts, size = np.zeros((len(ids), len(MLM_COUNTS)), np.int64), batch_rows(ids.shape[1])
    for number, (batch_ids, batch_mask) in enumerate(_batches((ids, mask), ids.shape[1])):
        start = number * size
        rows, places = np.nonzero(labels[start : start + size] != NOT_PREDICTED)
        states = [np.asarray(run(model.params, batch_ids, batch_mask)) for run, model in zip(encoders, models, strict=True)]
        for first in range(0, len(rows), PLACES):
            row, place = rows[first : first + PLACES], places[first : first + PLACES]
            chunk = [np.pad(each[row, place], ((0, PLACES - len(row)), (0, 0)))[None] for each in states]
            words = np.pad(labels[start + row, place], (0, PLACES - len(row)))[None]
            found = np.asarray(judge(models[0].params, models[1].params, *chunk, words))[0, : len(row)]
            np.add.at(counts, start + row, found)
    return counts


def _last_hidden(config: EncoderConfig, params: dict, ids: Int[Array, "B S"], mask: Num[Array, "B S"]) -> Float[Array, "B S D"]:
    last = Feature("hidden", config.num_layers)
    return forward(config, params, ids, mask, features=frozenset([last]))[last]


def _judge(student_config, teacher_config, vocab_size, student_params, teacher_params, student_hidden, teacher_hidden, words):
    """[1, P, 5] 0 or 1, MLM_COUNTS."""
    student = mlm_logits(student_config, student_params, student_hidden)[..., :vocab_size]
    teacher = mlm_logits(teacher_config, teacher_params, teacher_hidden)[..., :vocab_size]
    guess = jnp.argmax(teacher, axis=-1)
    rank = jnp.sum(student > jnp.take_along_axis(student, guess[..., None], axis=-1), axis=-1)
    right = jnp.argmax(student, axis=-1) == words
    counted = (jnp.ones_like(rank), rank == 0, rank < 5, guess == words, right)
    return jnp.stack([each.astype(jnp.int32) for each in counted], axis=-1)
