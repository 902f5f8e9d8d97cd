"""Faster ways to compute the numbers of `losses`; the plain form there is the oracle of each."""

from jaxdistill.kernels.choice import ON_CPU, Kernels, Platform
from jaxdistill.kernels.gram import attention_mse, relation_mse
from jaxdistill.kernels.output import mlm_cross_entropy, output_kl
from jaxdistill.kernels.relations import attention_kl, relation_kl, relations_kernel

__all__ = [
    "ON_CPU",
    "Kernels",
    "Platform",
    "attention_kl",
    "attention_mse",
    "mlm_cross_entropy",
    "output_kl",
    "relation_kl",
    "relation_mse",
    "relations_kernel",
]
