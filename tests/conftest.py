"""Strict: 8 fake devices, strict promotion, shapes checked, full precision, warnings are errors (pyproject.toml).

Programs are small and run once: XLA takes less time without its optimisations of machine code. `make test-newest` computes with them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # the suite never reaches for a network

from jaxtyping import install_import_hook

# Before the package is imported: every shape in a signature is checked at run time.
_hook = install_import_hook("jaxdistill", "shape_checks.checked")
_hook.__enter__()

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


pytest_plugins = ("shared_fixtures",)  # imported after the hook


def pytest_addoption(parser):
    parser.addoption("--each-value-once", action="store_true", help="of a grid of parameters: cases until every value was seen")


def pytest_collection_modifyitems(config, items):
    # A file is one worker's (Makefile), so that what its tests share is made once: the long ones first, that none is left at the end.
    items.sort(key=lambda item: not (item.path.parent.name in ("processes", "runs") or item.path.name == "test_recipes.py"))
    if not config.getoption("--each-value-once"):
        return
    seen, kept, dropped = set(), [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(item.nodeid.partition("[")[0], name, repr(value)) for name, value in params.items()}
        (dropped if values and values <= seen else kept).append(item)
        seen |= values
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For whole runs of milliseconds a step: hardly optimised programs, read from a cache when they are run again.

    In the environment too, so that a process of its own computes the same bits.
    """
    usual = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        for cache, quick in ((str(tmp_path_factory.mktemp("compiled")), True), (None, usual)):
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_disable_most_optimizations", quick)
            compilation_cache.reset_cache()
            if cache:
                yield
