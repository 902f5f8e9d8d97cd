"""Strict: 8 fake devices, strict promotion, shapes checked, full precision, warnings are errors (pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # the suite never reaches for a network

from jaxtyping import install_import_hook

# Before the package is imported: every shape in a signature is checked at run time.
_hook = install_import_hook("jaxdistill", "shape_checks.checked")
_hook.__enter__()

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
