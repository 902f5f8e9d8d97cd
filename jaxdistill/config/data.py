"""Where a run's rows come from: texts, or the examples of a task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxdistill.config.terms import AsTuple, Positive, Section
from jaxdistill.urls import check_url, is_url

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class SourceConfig(Section):
    """One text: files (`path`: a file, a folder or a glob, here or by URL: gs://, s3://, hf://) or a dataset of the Hub (`dataset`)."""

    path: str | None = None
    format: Literal["auto", "parquet", "jsonl", "text"] = "auto"
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the rows drawn; all sources or none
    language: Annotated[str, Field(min_length=1)] | None = None  # for counts in the metrics, and for sampling by language

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (local files) or dataset (a dataset of the Hub)")
        if not (self.path if self.path is not None else str(self.dataset)).strip().removeprefix("file://"):
            raise ValueError("an empty name is no place; the folder that one stands in is written as .")
        other = {"name", "split", "revision"} if self.path else {"format"}
        if ignored := sorted(name for name in other & self.model_fields_set if getattr(self, name) not in (None, "auto", "train")):
            raise ValueError(f"{ignored[0]} means nothing for a {'path' if self.path else 'dataset'}; leave it out")
        if self.path is not None:
            check_url(self.path)
        return self


class TaskConfig(Section):
    """Examples of a task instead of a text, one a row: `data` is a folder in the layout of the Hub's dataset, or the Hub."""

    name: str
    data: str | None = None
    train_limit: Positive | None = None  # training rows, a random subset, the same as in `evaluate`; default: all

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class DataConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], AsTuple, Field(min_length=1)] | None = None
    task: TaskConfig | None = None
    sequence_length: Annotated[int, Field(ge=8, le=8192)] = 128
    held_out: Fraction = 0.01  # share of the documents, chosen by their hash
    packing: bool = False  # rows hold several texts: True keeps them invisible to each other
    tokenizer: str | None = None  # default: the teacher's
    store: str | None = None  # folder of the token store, or its URL on object storage; default: beside the run
    deduplicate: bool = False  # of documents with the same text the first stays; the text is read twice
    sampling_exponent: Share | None = None  # a language's share of the rows drawn: its rows to this power; 0.3 in XLM-R
    streaming: bool = False  # no token store: text is read and tokenised while the run goes on
    window: Positive = 65_536  # rows of a stream that are shuffled together

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> DataConfig:
        if (self.sources is None) == (self.task is None):
            raise ValueError(f"give either sources (a text) or task (a task's examples){', not both' if self.task else ''}")
        if self.task and self.packing:
            raise ValueError("packing: a row of a task holds one example; leave packing out")
        for field in ("held_out", "store", "deduplicate", "sampling_exponent", "streaming", "window") if self.task else ():
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: means nothing for a task, which has a split of its own and no token store; leave it out")
        return self

    @pydantic.model_validator(mode="after")
    def _place_of_store(self) -> DataConfig:
        if self.store is not None:
            check_url(self.store)
            if self.deduplicate and is_url(self.store):
                raise ValueError("deduplicate: keeps files in the store that an object storage cannot; prepare in a folder and copy it")
        return self

    @pydantic.model_validator(mode="after")
    def _weights(self) -> DataConfig:
        sources = self.sources or ()
        for field in ("weight", "language"):
            given = [getattr(source, field) is not None for source in sources]
            if any(given) and not all(given):
                raise ValueError(f"give every source a {field}, or none{' (then each is read once per epoch)' * (field == 'weight')}")
        weighted = bool(sources) and sources[0].weight is not None
        if self.sampling_exponent is not None:
            if weighted:
                raise ValueError("sampling_exponent: the weights of the sources say their shares already; leave one of the two out")
            if len({source.language or i for i, source in enumerate(sources)}) < 2:
                raise ValueError("sampling_exponent: divides the rows between languages, and there is only one; leave it out")
            if self.streaming:
                raise ValueError("sampling_exponent: the rows of a stream cannot be counted beforehand; give each source a weight")
        if self.streaming and len(sources) > 1 and not weighted:
            raise ValueError("streaming: the sources of a stream are read side by side; give each a weight")
        if self.streaming and self.deduplicate:
            raise ValueError("deduplicate: needs the whole text before the first step, and a stream reads it once; prepare a token store")
        if self.streaming and self.store and is_url(self.store):
            raise ValueError(f"store: of a stream it is the folder of a small index, not a URL, got {self.store!r}")
        if not self.streaming and self.window != type(self).model_fields["window"].default:
            raise ValueError("window: a token store is shuffled as a whole; leave it out, or take streaming: true")
        return self
