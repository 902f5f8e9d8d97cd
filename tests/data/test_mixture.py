import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from jaxdistill.config import DataConfig
from jaxdistill.data import RowOrder, language_numbers, language_shares, language_tokens, languages, row_order
from jaxdistill.data.mixture import exponent_weights
from jaxdistill.errors import InputError


def data(*names, weights=None, **fields) -> DataConfig:
    sources = [{"path": f"{i}.txt", "language": name} for i, name in enumerate(names)]
    for source, weight in zip(sources, weights or (), strict=False):
        source["weight"] = weight
    return DataConfig(sources=sources, **fields)


def test_the_formula_of_the_papers():
    # XLM-R's example shape: q_i = p_i ** alpha / sum; 90 % and 10 % at 0.3.
    weights = np.array(exponent_weights([900, 100], 0.3))
    assert np.allclose(weights / weights.sum(), np.array([0.9**0.3, 0.1**0.3]) / (0.9**0.3 + 0.1**0.3))
    assert np.allclose(exponent_weights([900, 100], 1), [0.9, 0.1])
    assert exponent_weights([900, 100, 0], 0) == [1.0, 1.0, 0.0]


def drawn(order: RowOrder, sizes, epochs: int = 1) -> np.ndarray:
    """How often each source is drawn."""
    rows = order.rows(np.arange(epochs * order.rows_per_epoch))
    return np.bincount(np.searchsorted(np.cumsum(sizes), rows, side="right"), minlength=len(sizes))


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.7, 1.0])
def test_an_epoch_has_the_share_of_every_language(exponent):
    """Sources of a language are one: 0 and 3 are en, apart from one another; 1 has no row to train on."""
    sizes = (600, 0, 100, 250, 50)
    config = data("en", "sw", "de", "en", "ur", sampling_exponent=exponent)
    assert languages(config) == {"en": [0, 3], "sw": [1], "de": [2], "ur": [4]}
    share = np.array([850, 100, 50]) ** exponent / (np.array([850, 100, 50]) ** exponent).sum()
    found = drawn(row_order(config, sizes, 3), sizes, epochs=4)
    assert found[1] == 0 and found.sum() == 4000
    assert np.allclose([found[0] + found[3], found[2], found[4]], 4000 * share, atol=4)
    assert abs(found[0] / (found[0] + found[3]) - 600 / 850) < 0.03
    table = {each.name: (each.rows, each.drawn) for each in language_shares(config, sizes)}
    assert table == {"en": (850, (found[0] + found[3]) / 4), "sw": (0, 0), "de": (100, found[2] / 4), "ur": (50, found[4] / 4)}


def test_a_language_of_several_sources_is_walked_through_as_one():
    sizes = (6, 30, 0, 11)
    order = row_order(data("sw", "en", "sw", "sw", sampling_exponent=0.3), sizes, 0)
    rows = order.rows(np.arange(40 * order.rows_per_epoch))
    swahili = rows[(rows < 6) | (rows >= 36)]
    passes = swahili[: len(swahili) // 17 * 17].reshape(-1, 17)
    assert len(passes) > 10 and (np.sort(passes, axis=1) == [*range(6), *range(36, 47)]).all()


def test_the_rarest_language_has_at_least_its_own_share():
    """So an exponent never leaves one out, however small it is."""
    sizes = np.random.default_rng(0).integers(1, 10**6, 100)
    sizes[7] = 1
    config = data(*map(str, range(100)), sampling_exponent=0.7)
    assert all(each.drawn >= 1 for each in language_shares(config, sizes.tolist()))
    row_order(config, sizes.tolist(), 0)


def test_weights_and_none():
    sizes = (50, 150)
    assert [each.drawn for each in language_shares(data("en", "de", weights=(3.0, 1.0)), sizes)] == [150, 50]
    assert [each.drawn for each in language_shares(data("en", "de"), sizes)] == [50, 150]
    plain = DataConfig(sources=["a", "b"])
    assert languages(plain) == {"source_0": [0], "source_1": [1]}
    assert languages(data("en", "en")) == languages(DataConfig(sources=["a"])) == {}
    numbers = np.arange(0, 400_000, 7)
    assert np.array_equal(row_order(plain, sizes, 4).rows(numbers), RowOrder(sizes, None, 4).rows(numbers))


def test_the_number_of_a_rows_language():
    numbers = language_numbers(data("en", "de", "en"), (2, 0, 3), np.array([0, 1, 2, 4]))
    assert numbers.tolist() == [0, 0, 0, 0] and numbers.dtype == np.int32
    assert language_numbers(data("en", "de", "en"), (2, 2, 1), np.arange(5)).tolist() == [0, 0, 1, 1, 0]


def test_tokens_are_counted_on_the_device():
    segments = np.random.default_rng(0).integers(0, 3, (2, 3, 5)).astype(np.int32)
    numbers = np.array([[0, 2, 0], [1, 1, 2]], np.int32)
    found = language_tokens(4, {"segment_ids": jnp.asarray(segments), "languages": jnp.asarray(numbers)})["languages"]
    assert found.tolist() == [int((segments[numbers == language] > 0).sum()) for language in range(4)]
    assert language_tokens(0, {"segment_ids": jnp.asarray(segments)}) == {}


@pytest.mark.parametrize(
    "sources, fields, message",
    [
        ([{"path": "a", "language": "en"}, {"path": "b"}], {}, "give every source a language, or none"),
        ([{"path": "a", "weight": 1}, {"path": "b", "weight": 2}], {"sampling_exponent": 0.3}, "leave one of the two out"),
        ([{"path": "a", "language": "en"}, {"path": "b", "language": "en"}], {"sampling_exponent": 0.3}, "there is only one"),
        (["a", "b"], {"sampling_exponent": 1.5}, "less than or equal to 1"),
        (["a", "b"], {"sampling_exponent": 0.3, "streaming": True}, "give each source a weight"),
        (["a", "b"], {"streaming": True}, "give each a weight"),
        (["a"], {"window": 100}, "or take streaming: true"),
    ],
)
def test_shares_that_cannot_be(sources, fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        DataConfig(sources=sources, **fields)


def test_an_epoch_that_draws_nothing_of_a_language():
    with pytest.raises(InputError, match=r"data\.sources\.0: its share \(weight\) of an epoch of 20 rows is less than one row"):
        row_order(data("en", "de", weights=(0.001, 1.0)), (10, 10), 0)
