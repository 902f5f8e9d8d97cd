"""Which published row a student of ours repeats: the same shape, vocabulary, method and layers of the teacher; else none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.compare.published import Published, udagawa2023, udagawa_shapes, wang2023
from jaxdistill.layer_map import STRATEGIES

MULTILINGUAL, BERT, ROBERTA = 250002, 30522, 50265  # vocabularies of XLM-R, of BERT (English and uncased) and of RoBERTa
BASE = 12  # layers of the papers' teachers
Term = Mapping[str, Any]


def find_published(model: Mapping[str, Any], teacher_layers: Mapping[str, int], protocol: str = "") -> tuple[Published | None, str]:
    """The published row of a student, or None and why there is none.

    Args:
      model: section `model` of its results.
      teacher_layers: depth of the models that are compared, by name: a teacher among them need not be told by its name.
      protocol: name of the fine-tuning protocol; it chooses where two papers have the same student.
    """
    distilled = model.get("distilled")
    if not distilled:
        return None, "not a student with a run beside it: how it was distilled is not known"
    teacher = str(distilled.get("teacher") or "")
    depth = _depth(teacher, teacher_layers)
    if depth != BASE:
        what = "is not known" if depth is None else f"is {depth}"
        return None, f"the depth of its teacher {what}; the papers' teachers have {BASE} layers"
    finders = {"udagawa2023": _udagawa, "wang2023": _wang}
    for name in sorted(finders, key=lambda each: not protocol.startswith(each)):
        if found := finders[name](model, distilled):
            return found, ""
    return None, "no published row has its shape, vocabulary, objective and layers of the teacher"


def _depth(teacher: str, known: Mapping[str, int]) -> int | None:
    name = teacher.rstrip("/").split("/")[-1]
    if name in known:
        return known[name]
    words = name.lower().replace("_", "-").split("-")
    return BASE if "base" in words else 24 if "large" in words else None


def _shape(model: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(model.get(size) for size in ("num_layers", "num_heads", "hidden_size", "intermediate_size"))


def _strategy(term: Term) -> tuple[str, dict[str, Any]]:
    said = term.get("layer_map") or "last_layer"
    if isinstance(said, str):
        return said, {}
    return said.get("strategy") or "last_layer", {name: value for name, value in said.items() if name != "strategy" and value is not None}


def layer_mapping(term: Term) -> str | None:
    """The layers of a term as the published tables call them; None: another choice."""
    strategy, options = _strategy(term)
    if options.get("embeddings") or strategy not in STRATEGIES:
        return None
    if strategy == "teacher_layer":
        layer = options.get("teacher_layer")
        steps = None if not isinstance(layer, int) else (-1 - layer if layer < 0 else BASE - layer)
        return {0: "last_layer", 1: "teacher_minus_1", 2: "teacher_minus_2"}.get(steps)
    return strategy if strategy in ("last_layer", "last", "uniform", "uniform_consecutive", "uniform_plus_last") else None


def _udagawa(model: Mapping[str, Any], distilled: Mapping[str, Any]) -> Published | None:
    student = udagawa_shapes().get(_shape(model))
    family, vocabulary = model.get("family"), model.get("vocab_size")
    setting = {("bert", BERT): "monolingual", ("xlm-roberta", MULTILINGUAL): "multilingual"}.get((family, vocabulary))
    if student is None or setting is None:
        return None
    method, mapping = _method(distilled, model)
    keys = {"method": method, "layer_mapping": mapping, "setting": setting, "student": student}
    return next((row for row in udagawa2023() if row.keys == keys), None)


def _method(distilled: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str | None, str | None]:
    terms, before = _terms(distilled.get("objective")), list((distilled.get("before") or {}).values())
    kinds = sorted(term["kind"] for term in terms)
    stages = distilled.get("stages") or []
    start = distilled.get("initialise") or "random"
    if start == "distilbert" and not stages and set(kinds) - {"mlm_cross_entropy"} == {"hidden_cosine", "output_kl"}:
        return "DistilBERT", "init+cosine+OD"
    if len(terms) != 1 or start != "random":
        return None, None
    if kinds == ["output_kl"]:
        # The layers that count are those of the hidden-state transfer before; without them the row is not known.
        first = _terms(before[0]) if len(before) == 1 else ()
        return ("OD", layer_mapping(first[0])) if len(first) == 1 and _is_hidden(first[0]) else (None, None)
    if len(stages) > 1:
        return None, None
    term = terms[0]
    if _is_hidden(term):
        return "HS", layer_mapping(term)
    vectors = {term.get(name, 1 / 3) for name in ("query", "key", "value")}
    if len(vectors) > 1 or any((term.get("cross") or {}).values()):
        return None, None
    heads = term.get("relation_heads")
    if kinds == ["relation_kl"] and heads in (None, 48):
        return "MiniLMv2", layer_mapping(term)
    if kinds == ["direct_mse"] and heads in (None, "native", model.get("num_heads")):
        return "DirectMiniLM", layer_mapping(term)
    return None, None


def _is_hidden(term: Term) -> bool:
    return term["kind"] == "hidden_mse" and term.get("tokens", "all") == "all"


def _terms(objective: Any) -> tuple[Term, ...]:
    """An objective in any of the forms that a config allows."""
    listed: Sequence[Any] = [objective] if isinstance(objective, (str, Mapping)) else objective or []
    return tuple({"kind": term} if isinstance(term, str) else {"kind": "relation_kl"} | dict(term) for term in listed)


def _label(term: Term) -> str | None:
    kind = term["kind"]
    if kind == "hidden_mse":
        return {"all": "Hid-Seq", "cls": "Hid-CLS"}.get(term.get("tokens", "all"))
    if kind == "relation_kl":
        value_only = term.get("query", 1) == 0 == term.get("key", 1) and term.get("value") and not any((term.get("cross") or {}).values())
        return "Val-KL" if term.get("relation_heads") == "native" and value_only else None
    return {"attention_mse": "Att-MSE", "attention_kl": "Att-KL", "hidden_contrastive": "Hid-CLS-Contrast"}.get(kind)


def _objective(terms: Sequence[Term], hard: str) -> str | None:
    kinds = {term["kind"] for term in terms}
    if kinds == {"output_kl", hard}:
        return "Vanilla KD"
    labels = [_label(term) for term in terms]
    return None if None in labels else "+".join(sorted(labels, key=_ORDER.index))


_ORDER = ["Hid-CLS-Contrast", "Hid-CLS", "Att-MSE", "Att-KL", "Hid-Seq", "Val-KL"]


def _wang(model: Mapping[str, Any], distilled: Mapping[str, Any]) -> Published | None:
    """Task-agnostic: BERT-base -> 6 x 768, last layer to last layer. Task-specific (`task` is said): RoBERTa-base -> 3 x 768, which
    learns from the layers that it was initialised with."""
    terms = _terms(distilled.get("objective"))
    start = distilled.get("initialise") or "random"
    mapped = [term for term in terms if term["kind"] not in ("output_kl", "mlm_cross_entropy", "task_cross_entropy")]
    kind = (_shape(model), model.get("family"), model.get("vocab_size"))
    if distilled.get("task"):
        layers = list(start) if isinstance(start, (list, tuple)) else []
        pairs = [[student, teacher] for student, teacher in enumerate(layers, 1)]
        fits = kind == ((3, 12, 768, 3072), "roberta", ROBERTA) and all(_pairs(term) == pairs for term in mapped)
        begun, hard, setting = ",".join(map(str, layers)), "task_cross_entropy", "task_specific"
    else:
        fits = kind == ((6, 12, 768, 3072), "bert", BERT) and all(layer_mapping(term) == "last_layer" for term in mapped)
        fits = fits and len(distilled.get("stages") or []) < 2
        begun = {"random": "random", "first_k": "first 6", "[1, 2, 3, 4, 5, 6]": "first 6"}.get(str(start))
        hard, setting = "mlm_cross_entropy", "task_agnostic"
    if not fits or not terms:
        return None
    keys = {"objective": _objective(terms, hard), "initialised_from": begun, "setting": setting}
    return next((row for row in wang2023() if row.keys == keys), None)


def _pairs(term: Term) -> list[list[int]] | None:
    strategy, options = _strategy(term)
    return sorted(map(list, options.get("pairs") or [])) if strategy == "explicit" else None
