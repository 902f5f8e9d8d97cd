"""What the encoder returns and what it leaves out; rows and padding that must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.features import Feature, all_features
from jaxdistill.models import encode, forward, init_params, mlm_logits
from jaxdistill.models.encoder import Keys, linear

CONFIG = tiny_config(num_layers=4)
PARAMS = random_params(CONFIG)
IDS, MASK = tiny_rows(CONFIG, ((0, 9), (0, 5), (0, 1)), 9)


@partial(jax.jit, static_argnums=0, static_argnames=("features", "dtype"))
def run(config, params, ids, mask, types=None, segments=None, *, features, dtype=jnp.float32):
    return forward(config, params, ids, mask, types, segments, features=features, dtype=dtype)


def last_hidden(config) -> frozenset[Feature]:
    return frozenset({Feature("hidden", config.num_layers)})


def present(output) -> set[Feature]:
    return {Feature(kind, layer) for kind in ("hidden", "query", "key", "value") for layer in getattr(output, kind)}


def compiled_flops(features) -> float:
    return run.lower(CONFIG, PARAMS, IDS, MASK, features=frozenset(features)).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def everything():
    return run(CONFIG, PARAMS, IDS, MASK, features=all_features(range(5)))


@pytest.mark.parametrize(
    "features",
    [
        [Feature("hidden", 0)],
        [Feature("query", 3), Feature("key", 3), Feature("value", 3)],
        [Feature("hidden", 2), Feature("value", 1), Feature("key", 4)],
    ],
    ids=["embeddings", "one layer", "mixed"],
)
def test_exactly_the_features_asked_for(features, everything):
    output = run(CONFIG, PARAMS, IDS, MASK, features=frozenset(features))
    assert present(output) == set(features)
    for feature in features:
        assert output[feature].shape == (3, 9, 48)
        np.testing.assert_allclose(output[feature], everything[feature], rtol=1e-5, atol=1e-5)


def test_encode_returns_the_layers_asked_for():
    assert present(encode(CONFIG, PARAMS, IDS, MASK, layers=[0, 2])) == {
        Feature("hidden", 0), Feature("hidden", 2), Feature("query", 2), Feature("key", 2), Feature("value", 2)
    }  # fmt: skip


def test_flops_stop_at_the_deepest_feature():
    """The products of a block by hand: 4 projections and 2 feed-forward ones per token, scores and context per pair."""
    tokens, width, inner = IDS.size, CONFIG.hidden_size, CONFIG.intermediate_size
    projection = 2 * tokens * width * width
    block = 4 * projection + 2 * (2 * tokens * width * inner) + 2 * (2 * tokens * IDS.shape[1] * width)
    below, above = (compiled_flops({Feature("hidden", i)}) for i in (1, 2))
    assert block <= above - below <= 1.25 * block
    # Two of three projections and nothing else of the deepest block; what is read on the way costs nothing.
    extra = compiled_flops({Feature("query", 2), Feature("value", 2), Feature("hidden", 0), Feature("key", 1)}) - below
    assert 2 * projection <= extra <= 2.3 * projection


@pytest.mark.parametrize(
    ("features", "products"),
    [
        ([Feature("hidden", 0)], 0),
        ([Feature("query", 1)], 1),
        ([Feature("query", 3), Feature("value", 3), Feature("hidden", 1)], 2 * 8 + 2),
        ([Feature("hidden", 3)], 3 * 8),
    ],
    ids=["embeddings", "one projection", "two projections", "whole blocks"],
)
def test_products_that_the_program_holds(features, products):
    """Before XLA drops anything: 6 products with weights and 2 of attention in a whole block."""
    program = str(jax.make_jaxpr(partial(run, CONFIG, features=frozenset(features)))(PARAMS, IDS, MASK))
    assert program.count("dot_general[") == products


def test_weights_above_the_deepest_feature_are_not_read(everything):
    features = frozenset({Feature("value", 3), Feature("hidden", 2)})
    broken = {**PARAMS, "layers": dict(PARAMS["layers"])}
    broken["layers"]["04"] = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS["layers"]["04"])
    third = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS["layers"]["03"])
    broken["layers"]["03"] = {**third, "value": PARAMS["layers"]["03"]["value"]}
    output = run(CONFIG, broken, IDS, MASK, features=features)
    for feature in features:
        np.testing.assert_allclose(output[feature], everything[feature], rtol=1e-5, atol=1e-5)


def test_same_twice():
    features = last_hidden(CONFIG)
    first, second = (run(CONFIG, PARAMS, IDS, MASK, features=features).hidden[4] for _ in range(2))
    assert np.array_equal(first, second)


def test_plain_call_equals_jitted(everything):
    np.testing.assert_allclose(encode(CONFIG, PARAMS, IDS, MASK).hidden[4], everything.hidden[4], rtol=1e-5, atol=1e-5)


def test_gradient_is_finite_and_reaches_what_is_read():
    """Also with a row that is all padding, whose queries see nothing."""
    config = tiny_config(num_layers=2)
    ids, mask = tiny_rows(config, ((0, 0), (0, 9), (3, 4)), 9)

    @jax.jit
    def gradient(params, ids, mask):
        def value(params):
            output = forward(config, params, ids, mask, features=frozenset({Feature("query", 2)}))
            return jnp.sum(jnp.sin(output.query[2]) * mask[..., None].astype(jnp.float32))

        return jax.grad(value)(params)

    moved = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(random_params(config), ids, mask)):
        assert np.isfinite(leaf).all()
        moved[jax.tree_util.keystr(path, simple=True, separator="/")] = bool(np.any(leaf != 0))
    still = {path for path, any_moved in moved.items() if not any_moved}
    # Softmax does not see a bias that all keys share.
    assert still - {"layers/01/key/bias"} == {path for path in moved if path.startswith("layers/02") and "query" not in path}


def test_bfloat16_products_stay_near_float32(everything):
    features = frozenset({Feature("query", 2), Feature("hidden", 2)})
    rounded = run(CONFIG, PARAMS, IDS, MASK, features=features, dtype=jnp.bfloat16)
    for feature in features:
        assert rounded[feature].dtype == jnp.bfloat16
        error = jnp.abs(rounded[feature].astype(jnp.float32) - everything[feature]).max() / jnp.abs(everything[feature]).max()
        assert 1e-6 < error < 0.05


PACKED = [[7, 5, 2], [3, 1, 9]]  # lengths of the texts in each row of 16


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_rows_equal_separate_rows(family):
    config = tiny_config(family, num_layers=2)
    params, features = random_params(config, 1), all_features(range(3))
    rng = np.random.default_rng(2)
    texts = [[rng.integers(5, config.vocab_size, n) for n in lengths] for lengths in PACKED]
    ids = np.full((2, 16), config.pad_token_id, np.int32)
    segments = np.zeros((2, 16), np.int32)
    separate, places = np.full((6, 16), config.pad_token_id, np.int32), []
    for row, own in enumerate(texts):
        start = 0
        for number, text in enumerate(own, 1):
            ids[row, start : start + len(text)], segments[row, start : start + len(text)] = text, number
            separate[len(places), : len(text)] = text
            places.append((row, start, len(text)))
            start += len(text)
    packed = run(config, params, ids, (segments > 0).astype(np.int32), None, segments, features=features)
    mask = np.array([[slot < length for slot in range(16)] for _, _, length in places], np.int32)
    alone = run(config, params, separate, mask, features=features)
    for feature in features:
        for i, (row, start, length) in enumerate(places):
            np.testing.assert_allclose(packed[feature][row, start : start + length], alone[feature][i, :length], rtol=1e-5, atol=1e-5)
        assert np.isfinite(packed[feature]).all()


def test_one_segment_equals_an_unpacked_row():
    config = tiny_config("roberta", num_layers=2)
    params, features = random_params(config, 1), last_hidden(config)
    ids, mask = tiny_rows(config, ((0, 16), (0, 11)), 16)
    plain, packed = (run(config, params, ids, mask, None, segments, features=features).hidden[2] for segments in (None, mask))
    real = mask[..., None].astype(np.float32)
    np.testing.assert_allclose(packed * real, plain * real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "side"), [("bert", "right"), ("roberta", "right"), ("roberta", "left")])
def test_padding_does_not_matter(family, side):
    config = tiny_config(family, num_layers=2)
    params, features = random_params(config, 3), all_features(range(3))
    ids, mask = tiny_rows(config, ((0, 9), (0, 9)), 9)
    alone = run(config, params, ids, mask, features=features)
    width = ((0, 0), (0, 7) if side == "right" else (7, 0))
    padded = np.pad(ids, width, constant_values=config.pad_token_id)
    output = run(config, params, padded, np.pad(mask, width), features=features)
    real = slice(0, 9) if side == "right" else slice(7, 16)
    for feature in features:
        np.testing.assert_allclose(output[feature][:, real], alone[feature], rtol=1e-5, atol=1e-5)


def test_what_lies_under_padding_does_not_matter():
    noise = np.where(MASK, IDS, np.random.default_rng(0).integers(5, 101, IDS.shape)).astype(np.int32)
    features, real = last_hidden(CONFIG), MASK[..., None].astype(np.float32)
    clean, noisy = (run(CONFIG, PARAMS, ids, MASK, features=features).hidden[4] * real for ids in (IDS, noise))
    np.testing.assert_allclose(clean, noisy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature("hidden", 5), r"no hidden of layer 5: the encoder has layers 1\.\.4"),
        (Feature("query", 0), "no query of layer 0"),
        (Feature("hidden", -1), "no hidden of layer -1"),
    ],
)
def test_layers_that_are_not_there(feature, message):
    with pytest.raises(ValueError, match=message):
        forward(CONFIG, PARAMS, jnp.asarray(IDS), jnp.asarray(MASK), features=frozenset({feature}))


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 38)])
def test_rows_longer_than_the_position_table(family, longest):
    config = tiny_config(family, num_layers=1)
    assert config.max_sequence_length == longest
    params = random_params(config)
    ids = np.full((1, longest + 1), 7, np.int32)
    fits = run(config, params, ids[:, 1:], np.ones_like(ids[:, 1:]), features=frozenset({Feature("hidden", 0)}))
    assert np.isfinite(fits.hidden[0]).all()
    with pytest.raises(ValueError, match=rf"sequence length {longest + 1} is over the encoder's {longest} positions"):
        encode(config, params, ids, np.ones_like(ids))


def test_mlm_head_is_missing():
    with pytest.raises(ValueError, match="no MLM head"):
        mlm_logits(CONFIG, PARAMS, jnp.zeros((1, 2, 48)))


def test_fresh_parameters():
    config = tiny_config(num_layers=1, hidden_size=96, vocab_size=997)
    init = jax.jit(partial(init_params, config, pooler=True, mlm=True))
    params, again, other = init(jax.random.key(1)), init(jax.random.key(1)), init(jax.random.key(2))
    assert set(params) == {"embeddings", "layers", "pooler", "mlm"} and list(params["layers"]) == ["01"]
    seen = []
    for (path, leaf), same, fresh in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(again), jax.tree.leaves(other), strict=True
    ):
        name = path[-1].key
        assert leaf.dtype == jnp.float32 and np.array_equal(leaf, same)
        if name in ("kernel", "embedding"):
            assert not np.array_equal(leaf, fresh)
            # As in BERT's own code: 0.02 is the normal's before it is cut at twice that, which leaves 0.8796 of it.
            assert abs(leaf).max() <= 0.04
            assert abs(float(leaf.mean())) < 4 * 0.02 / leaf.size**0.5
            assert abs(float(leaf.std()) / (0.8796 * 0.02) - 1) < 4 / leaf.size**0.5
            seen.append(leaf.reshape(-1)[:64])
        else:
            assert np.all(np.asarray(leaf) == (name == "scale"))
    correlations = np.corrcoef(np.stack(seen)) - np.eye(len(seen))
    assert np.abs(correlations).max() < 5 / 8  # no two arrays from one key


def test_products_are_over_rows():
    """One contracted dimension in every product of the gradient: of two, XLA's CPU backend makes a transposed copy first."""
    layer = linear(6, 10, tiny_config(), jnp.dtype("float32"), Keys(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    kernel, bias = layer.kernel[...], layer.bias[...]
    np.testing.assert_allclose(layer(x), x @ kernel + bias[None, None], rtol=1e-6, atol=1e-6)
    graph, params = nnx.split(layer)
    gradient = jax.make_jaxpr(jax.grad(lambda params, x: jnp.sum(nnx.merge(graph, params)(x) ** 2), argnums=(0, 1)))(params, x)
    contracted = [eqn.params["dimension_numbers"][0] for eqn in gradient.eqns if eqn.primitive.name == "dot_general"]
    assert len(contracted) == 3 and all(len(left) == 1 for left, _ in contracted)


def test_keys_are_those_of_nnx():
    """Of a seed, the weights that a random initialisation has always given."""
    ours, theirs = Keys(jax.random.key(3)), nnx.Rngs(params=jax.random.key(3))
    for _ in range(4):
        assert ours.params() == theirs.params()
