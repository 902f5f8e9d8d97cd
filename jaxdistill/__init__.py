"""jaxdistill: make encoders small, in JAX."""

__version__ = "0.1.0"
