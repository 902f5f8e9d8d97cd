"""Faster ways to compute the numbers of `losses`; the plain form there is the oracle of each."""

from jaxdistill.kernels.choice import ON_CPU, Kernels, Platform
from jaxdistill.kernels.output import mlm_cross_entropy, output_kl
from jaxdistill.kernels.relations import attention_kl, relation_kl

__all__ = ["ON_CPU", "Kernels", "Platform", "attention_kl", "mlm_cross_entropy", "output_kl", "relation_kl"]
