"""The spec of every parameter against a table by hand; the optimizer's state lies where its parameter lies."""

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny_models import random_params, tiny_config

from jaxdistill.config import MeshConfig, OptimizerConfig
from jaxdistill.errors import InputError
from jaxdistill.optimizer import create_optimizer
from jaxdistill.sharding import batch_sharding, create_mesh, mesh_shape, partition_spec, tree_shardings

WHOLE = P()
BLOCK = {
    **{f"{kind}/kernel": P("fsdp", "tensor") for kind in ("query", "key", "value")},
    **{f"{kind}/bias": P("tensor") for kind in ("query", "key", "value")},
    "attention_output/kernel": P("tensor", "fsdp"),
    "attention_output/bias": WHOLE,
    "attention_norm/scale": WHOLE,
    "attention_norm/bias": WHOLE,
    "intermediate/kernel": P("fsdp", "tensor"),
    "intermediate/bias": P("tensor"),
    "output/kernel": P("tensor", "fsdp"),
    "output/bias": WHOLE,
    "output_norm/scale": WHOLE,
    "output_norm/bias": WHOLE,
}
OUTSIDE = {
    "embeddings/word/embedding": P("tensor", "fsdp"),
    "embeddings/position/embedding": P(None, "fsdp"),
    "embeddings/token_type/embedding": P(None, "fsdp"),
    "embeddings/norm/scale": WHOLE,
    "embeddings/norm/bias": WHOLE,
    "pooler/dense/kernel": P("fsdp", None),
    "pooler/dense/bias": WHOLE,
    "mlm/dense/kernel": P("fsdp", None),
    "mlm/dense/bias": WHOLE,
    "mlm/norm/scale": WHOLE,
    "mlm/norm/bias": WHOLE,
    "mlm/bias": P("tensor"),
    "mlm/decoder": P("fsdp", "tensor"),
}
EXPECTED = OUTSIDE | {f"layers/{i:02d}/{name}": spec for i in (1, 2) for name, spec in BLOCK.items()}
CONFIG = tiny_config(num_layers=2, vocab_size=104)


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(CONFIG, pooler=True, mlm=True, tied=False)


@pytest.fixture(scope="module")
def mesh():
    return create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def specs(tree, mesh) -> dict[str, P]:
    leaves = jax.tree_util.tree_leaves_with_path(tree_shardings(tree, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves}


def test_every_parameter(params, mesh):
    assert specs(params, mesh) == EXPECTED


def test_arrays_are_split_as_told(params, mesh):
    placed = jax.device_put(params, tree_shardings(params, mesh))
    assert placed["embeddings"]["word"]["embedding"].addressable_shards[0].data.shape == (52, 24)
    assert placed["layers"]["01"]["intermediate"]["kernel"].addressable_shards[0].data.shape == (24, 40)
    assert placed["layers"]["02"]["output_norm"]["scale"].addressable_shards[0].data.shape == (48,)


def test_optimizer_state_follows_its_parameter(params, mesh):
    state = jax.eval_shape(create_optimizer(OptimizerConfig(), 10).init, {"params": params, "projections": {}})
    found = specs(state, mesh)
    for moment in ("mu", "nu"):
        own = {name.split(f"{moment}/params/")[1]: spec for name, spec in found.items() if f"{moment}/params/" in name}
        assert own == EXPECTED
    rest = {name: spec for name, spec in found.items() if "params/" not in name}
    assert rest and set(rest.values()) == {WHOLE}  # step counts


@pytest.mark.parametrize(
    ("path", "shape", "axes", "expected"),
    [
        ("embeddings/word/embedding", (101, 48), {"data": 1, "fsdp": 2, "tensor": 4}, P(None, "fsdp")),
        ("embeddings/word/embedding", (104, 46), {"data": 1, "fsdp": 4, "tensor": 2}, P("tensor", None)),
        ("layers/01/query/kernel", (48, 48), {"data": 1, "fsdp": 1, "tensor": 8}, P("fsdp", "tensor")),
        ("layers/01/query/kernel", (12, 12), {"data": 1, "fsdp": 1, "tensor": 8}, P("fsdp", None)),
        ("layers/01/query/bias", (12,), {"data": 1, "fsdp": 1, "tensor": 8}, P(None)),
        ("projections/query/kernel", (2, 48, 48), {"data": 8, "fsdp": 1, "tensor": 1}, WHOLE),  # another rank: not that parameter
        ("my_query/kernel", (48, 48), {"data": 8, "fsdp": 1, "tensor": 1}, WHOLE),
        ("anything/else", (48, 48), {"data": 8, "fsdp": 1, "tensor": 1}, WHOLE),
    ],
)
def test_dimensions_that_do_not_divide_stay_whole(path, shape, axes, expected):
    assert partition_spec(path, shape, create_mesh(MeshConfig(**axes))) == expected


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"tensor": 2}, (4, 1, 2)),
        ({"fsdp": 8}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_mesh(axes, expected):
    assert tuple(mesh_shape(MeshConfig(**axes), 8).values()) == expected
    mesh = create_mesh(MeshConfig(**axes))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == expected
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_of_some_devices():
    assert create_mesh(MeshConfig(), jax.devices()[:3]).shape == {"data": 3, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, "does not cover the 8 devices here; leave data at -1"),
        ({"data": 4}, "does not cover the 8 devices"),
        ({"data": 4, "fsdp": 4}, "does not cover the 8 devices"),
        ({"tensor": 16}, "does not cover the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of data, fsdp, tensor may be -1"),
        ({"fsdp": 0}, "sizes are at least 1"),
        ({"data": -2}, "sizes are at least 1"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(InputError, match=f"^mesh: .*{message}"):
        mesh_shape(MeshConfig(**axes), 8)


def test_batch(mesh):
    assert batch_sharding(mesh).spec == P(None, ("data", "fsdp"))
    assert batch_sharding(mesh).shard_shape((3, 8, 16)) == (3, 2, 16)
