"""How a model is fine-tuned and scored: what, on which tasks, under which protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from jaxdistill.config.load import apply_overrides, read_config_file, validated
from jaxdistill.config.sections import Fraction, MeshConfig
from jaxdistill.config.terms import AsTuple, Folder, NotNegative, Positive, Section
from jaxdistill.errors import InputError, nearest

Rate = Annotated[float, Field(gt=0)]
# A list, or one value alone.
_Several = BeforeValidator(
    lambda value: tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (int, float)) else value
)

# udagawa2023, appendix D: one rate and batch for every model and task; CoLA longer (10 epochs with their multilingual models).
# wang2023, table 6 and appendix A: a grid, 10 epochs, the best on the dev set. What they do not say is as in transformers.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "udagawa2023": {"epochs_of": {"cola": 6, "xnli": 5}},
    "udagawa2023_multilingual": {"epochs_of": {"cola": 10, "xnli": 5}},
    "wang2023": {
        "learning_rates": (1e-5, 3e-5, 5e-5, 8e-5),
        "batch_sizes": (16, 32),
        "epochs": 10,
        "seeds": (0,),
        "report": "best",
    },
}


class Protocol(Section):
    """AdamW with a linear decay to 0; the defaults are transformers' and udagawa2023's. By name, or with what differs from it."""

    name: str = "udagawa2023"
    learning_rates: Annotated[tuple[Rate, ...], _Several, Field(min_length=1)] = (2e-5,)
    batch_sizes: Annotated[tuple[Positive, ...], _Several, Field(min_length=1)] = (32,)
    epochs: Positive = 3
    epochs_of: dict[str, Positive] = Field(default_factory=dict)  # of the tasks that take another number
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], _Several, Field(min_length=1)] = (0, 1, 2)
    report: Literal["last", "best"] = "last"  # best: of all epochs and of the grid, on the dev set
    max_length: Annotated[int, Field(ge=8)] = 128  # tokens of an example, special ones included
    train_limit: Positive | None = None  # rows to train on, a random subset; None: all
    warmup: Fraction = 0.0  # share of the steps
    weight_decay: NotNegative = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: Rate = 1e-8
    clip_norm: NotNegative = 1.0  # 0: none

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        name = value.get("name", "udagawa2023")
        if not isinstance(name, str) or name not in PROTOCOLS:
            raise ValueError(f"unknown protocol {name!r}{nearest(str(name), PROTOCOLS)}")
        # Epochs that are said are meant for every task, also for those to which the preset gives others.
        preset = {"epochs_of": {}} if "epochs" in value else {}
        return PROTOCOLS[name] | preset | value

    @pydantic.field_validator("seeds", "learning_rates", "batch_sizes")
    @classmethod
    def _once(cls, value: tuple) -> tuple:
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)} names one twice")
        return value

    def epochs_for(self, task: str) -> int:
        return self.epochs_of.get(task, self.epochs)


class EvaluationConfig(Section):
    """What `evaluate` and `finetune` do."""

    models: Annotated[tuple[str, ...], AsTuple] = ()  # folders, Hub ids, run folders (all their students), NAME=PATH
    tasks: Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] = ("glue",)
    data: str | None = None  # folder in the layout of the Hub's datasets; None: the Hub
    protocol: Protocol = Field(default_factory=lambda: Protocol.model_validate({}))
    train: bool = True  # False: score the classification head that the model has
    seeds_together: Literal["auto"] | bool = "auto"  # auto: on an accelerator, not on a CPU
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, bfloat16 elsewhere
    mesh: MeshConfig = MeshConfig()
    results: Folder = "results"  # folder of one JSON file a model
    output: Folder | None = None  # of finetune: folder of the model that it writes

    @pydantic.field_validator("tasks", "models", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value


def load_evaluation(arguments: Sequence[str]) -> EvaluationConfig:
    """From the words of a command line: models, KEY=VALUE for a field, and at most one YAML file.

    Raises:
      InputError: an unknown field, a wrong value.
    """
    values: dict[str, Any] = {}
    models, overrides = [], []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if separator and key.split(".")[0] in EvaluationConfig.model_fields:
            overrides.append(f"protocol.name={value}" if key == "protocol" and not value.startswith("{") else argument)
        elif argument.endswith((".yaml", ".yml")) and os.path.isfile(argument):
            if values:
                raise InputError(f"{argument}: a second config; one is read")
            values = read_config_file(argument)
        elif separator and "/" not in key and "/" not in value and not os.path.isdir(os.path.expanduser(value)):
            raise InputError(f"{argument}: neither a field nor NAME=PATH of a model{nearest(key, EvaluationConfig.model_fields)}")
        else:
            models.append(argument)
    if isinstance(values.get("protocol"), str):
        values["protocol"] = {"name": values["protocol"]}
    values = apply_overrides(values, overrides)
    if models:
        values["models"] = models
    return validated(EvaluationConfig, values)
