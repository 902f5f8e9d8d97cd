"""A student as a folder that transformers loads: safetensors, config, tokenizer and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxdistill.config import Config
from jaxdistill.data import save_tokenizer
from jaxdistill.models import EncoderConfig, save_pretrained


def export_student(
    folder: Path, config: EncoderConfig, params: dict, *, tokenizer: Path, dtype: str, card: str, mlm: bool = False
) -> Path:
    """Write the folder whole or not at all; one that is there is replaced.

    Args:
      params: of the encoder, with "pooler" for a base model that loads without a missing key, with "mlm" for an MLM model.
      tokenizer: folder whose tokenizer goes along.
      card: text of README.md.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_pretrained(temporary, config, params, mlm=mlm, dtype=dtype)
    save_tokenizer(tokenizer, temporary, config.max_sequence_length)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def model_card(name: str, run: Config, student: EncoderConfig, *, steps: int, tokens: int, layer_map: dict) -> str:
    """What a reader needs to know of a student, in the Hub's format."""
    teacher = Path(run.teacher).name if Path(run.teacher).is_absolute() else run.teacher
    sources = ", ".join(Path(source.path).name if source.path else str(source.dataset) for source in run.data.sources)
    maps = "; ".join(f"{term}: {', '.join(f'{s} <- {t}' for s, t in pairs)}" for term, pairs in layer_map.items())
    return f"""---
library_name: transformers
tags: [distillation, jaxdistill]
---
# {name}

A {student.family} encoder of {student.num_layers} layers x {student.hidden_size} ({student.num_heads} heads, feed-forward
{student.intermediate_size}), distilled with [jaxdistill](https://github.com/jaxdistill/jaxdistill) from `{teacher}`.

| | |
|---|---|
| teacher | {teacher} |
| text | {sources} |
| tokens | {tokens:,} in {steps:,} steps of {run.training.batch_size} x {run.data.sequence_length} |
| objective (student layer <- teacher layer) | {maps} |

```python
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```

It is an encoder to fine-tune. Its pooler was not trained by the distillation.
"""
