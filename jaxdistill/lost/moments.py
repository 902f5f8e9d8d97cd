"""Linear CKA without keeping the vectors: sums over batches, whose size depends on the widths alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.shapes import Array, Float, Num

Moments = dict[str, jax.Array]


def batch_moments(xs: Float[Array, "B S I Dx"], ys: Float[Array, "B S J Dy"], mask: Num[Array, "B S"]) -> Moments:
    """Means and centred products of the real tokens of one batch, for every layer of x against every layer of y.

    Returns:
      count [], mean_x [I, Dx], mean_y [J, Dy], and the sums over tokens xy [I, Dx, J, Dy], xx [I, Dx, Dx], yy [J, Dy, Dy].
    """
    weights = (mask > 0).astype(jnp.float32).reshape(-1)
    count = jnp.maximum(jnp.sum(weights), 1.0)

    def centred(vectors):
        tokens = jnp.where(weights[:, None, None] > 0, vectors.astype(jnp.float32).reshape(-1, *vectors.shape[2:]), 0.0)
        mean = jnp.sum(tokens, axis=0) / count
        return mean, (tokens - mean[None]) * weights[:, None, None]

    (mean_x, x), (mean_y, y) = centred(xs), centred(ys)
    return {
        "count": jnp.sum(weights), "mean_x": mean_x, "mean_y": mean_y,
        "xy": jnp.einsum("tid,tje->idje", x, y), "xx": jnp.einsum("tid,tie->ide", x, x), "yy": jnp.einsum("tjd,tje->jde", y, y),
    }  # fmt: skip


def merged(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of tokens together (Chan et al. 1979): no sum is taken around anything but the sets' own means."""
    count = a["count"] + b["count"]
    share = b["count"] / jnp.maximum(count, 1.0)
    dx, dy = b["mean_x"] - a["mean_x"], b["mean_y"] - a["mean_y"]
    weight = a["count"] * share
    return {
        "count": count, "mean_x": a["mean_x"] + dx * share, "mean_y": a["mean_y"] + dy * share,
        "xy": a["xy"] + b["xy"] + weight * jnp.einsum("id,je->idje", dx, dy),
        "xx": a["xx"] + b["xx"] + weight * jnp.einsum("id,ie->ide", dx, dx),
        "yy": a["yy"] + b["yy"] + weight * jnp.einsum("jd,je->jde", dy, dy),
    }  # fmt: skip


@jax.jit
def cka(moments: Moments) -> Float[Array, "I J"]:
    """Linear centred kernel alignment of each pair of layers (Kornblith et al. 2019, eq. 5), 0..1; 1: equal up to rotation and scale."""
    norm_x, norm_y = (jnp.sqrt(jnp.sum(jnp.square(moments[which]), axis=(1, 2))) for which in ("xx", "yy"))
    return jnp.sum(jnp.square(moments["xy"]), axis=(1, 3)) / (norm_x[:, None] * norm_y[None, :])


@jax.jit
def group_sums(x: Float[Array, "B S Dx"], y: Float[Array, "B S Dy"], mask: Num[Array, "B S"]) -> dict[str, Moments]:
    """What `debiased_cka` needs of a batch's real tokens; the sums of several batches simply add up.

    `x` and `y` should lie near 0 (shifted by one constant for all batches), or the sums of squares lose their digits.
    """
    weights = (mask > 0).reshape(-1)
    x, y = (jnp.where(weights[:, None], v.astype(jnp.float32).reshape(-1, v.shape[-1]), 0.0) for v in (x, y))
    count = jnp.sum(weights.astype(jnp.float32))
    return {name: _pair_sums(a, b) | {"count": count} for name, (a, b) in {"xy": (x, y), "xx": (x, x), "yy": (y, y)}.items()}


def _pair_sums(a: Float[Array, "T Da"], b: Float[Array, "T Db"]) -> Moments:
    square_a, square_b = jnp.sum(jnp.square(a), axis=1), jnp.sum(jnp.square(b), axis=1)
    return {
        "product": a.T @ b,
        "a": jnp.sum(a, axis=0),
        "b": jnp.sum(b, axis=0),
        "squares_a": jnp.sum(square_a),
        "squares_b": jnp.sum(square_b),
        "squares": jnp.sum(square_a * square_b),
        "a_by_b": jnp.sum(a * square_b[:, None], axis=0),
        "b_by_a": jnp.sum(b * square_a[:, None], axis=0),
    }


def debiased_cka(sums: dict[str, Moments]) -> float | None:
    """Linear CKA from the unbiased HSIC (Song et al. 2012, eq. 5): comparable between sets of different numbers of tokens.

    The plain estimate rises towards 1 when there are fewer tokens than dimensions. At most 1, about 0 for unrelated vectors, and
    may be slightly negative. None for fewer than 4 tokens, or where one side does not vary.
    """
    values = {name: _unbiased_hsic({key: np.asarray(value, np.float64) for key, value in each.items()}) for name, each in sums.items()}
    if any(value is None for value in values.values()) or min(values["xx"], values["yy"]) <= 0:
        return None
    return float(values["xy"] / np.sqrt(values["xx"] * values["yy"]))


def _unbiased_hsic(s: dict[str, np.ndarray]) -> float | None:
    """Of linear kernels K = A A^T and L = B B^T without their diagonals, written with sums over tokens."""
    n = float(s["count"])
    if n < 4:
        return None
    trace = np.sum(s["product"] ** 2) - s["squares"]
    sum_k, sum_l = s["a"] @ s["a"] - s["squares_a"], s["b"] @ s["b"] - s["squares_b"]
    sum_kl = s["a"] @ s["product"] @ s["b"] - s["a"] @ s["a_by_b"] - s["b"] @ s["b_by_a"] + s["squares"]
    return float((trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * sum_kl / (n - 2)) / (n * (n - 3)))
