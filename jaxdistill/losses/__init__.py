"""Losses: pure formulas, arrays in, (sum, count) out, both float32 scalars; the value is sum / count in nats.

One masking rule: a padded key (mask 0, or with packed rows a key of another segment) never receives probability, a padded
query never counts. The division happens once, over the global batch.
"""

from jaxdistill.losses.attention import attention_kl, attention_mse
from jaxdistill.losses.contrastive import hidden_contrastive
from jaxdistill.losses.direct import direct_mse
from jaxdistill.losses.hidden import first_tokens, hidden_cosine, hidden_mse
from jaxdistill.losses.labels import label_cross_entropy, label_kl, label_mse
from jaxdistill.losses.layers import attended_layers
from jaxdistill.losses.output import mlm_cross_entropy, output_kl
from jaxdistill.losses.relations import relation_kl, relation_mse

__all__ = [
    "attended_layers",
    "attention_kl",
    "attention_mse",
    "direct_mse",
    "first_tokens",
    "hidden_contrastive",
    "hidden_cosine",
    "hidden_mse",
    "label_cross_entropy",
    "label_kl",
    "label_mse",
    "mlm_cross_entropy",
    "output_kl",
    "relation_kl",
    "relation_mse",
]
