"""Which published row a student repeats; where anything differs, none."""

import pytest
import yaml
from compared import MODEL, distilled
from tiny_models import tiny_config, write_model

from jaxdistill.compare.match import find_published
from jaxdistill.results import describe_model

SIX = {"num_layers": 6, "num_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
ROBERTA = {"num_layers": 3, "num_heads": 12, "hidden_size": 768, "intermediate_size": 3072, "family": "roberta", "vocab_size": 50265}
XLMR = {"family": "xlm-roberta", "vocab_size": 250002}


def teacher_layer(layer, kind="relation_kl"):
    return {"kind": kind, "layer_map": {"strategy": "teacher_layer", "teacher_layer": layer}}


def match(shape, *objective, protocol="", teachers=None, **more):
    return find_published({**MODEL, **shape, "distilled": distilled(*objective, **more)}, teachers or {}, protocol)[0]


@pytest.mark.parametrize(
    ("shape", "objective", "more", "keys"),
    [
        ({}, {"kind": "hidden_mse", "layer_map": "uniform"}, {}, ("HS", "uniform", "monolingual", "3L")),
        ({}, {"kind": "hidden_mse"}, {}, ("HS", "last_layer", "monolingual", "3L")),
        (XLMR, {"kind": "hidden_mse", "layer_map": {"strategy": "last"}}, {}, ("HS", "last", "multilingual", "3L")),
        ({}, {"kind": "relation_kl", "relation_heads": 48}, {}, ("MiniLMv2", "last_layer", "monolingual", "3L")),
        ({}, "relation_kl", {}, ("MiniLMv2", "last_layer", "monolingual", "3L")),
        ({}, teacher_layer(-1), {}, ("MiniLMv2", "last_layer", "monolingual", "3L")),
        ({}, teacher_layer(-2), {}, ("MiniLMv2", "teacher_minus_1", "monolingual", "3L")),
        ({}, teacher_layer(11), {}, ("MiniLMv2", "teacher_minus_1", "monolingual", "3L")),
        (SIX, teacher_layer(-3, "direct_mse"), {}, ("DirectMiniLM", "teacher_minus_2", "monolingual", "6L-DistilBERT")),
        (
            {},
            "output_kl",
            {"stages": ["transfer", "od"], "before": {"transfer": [{"kind": "hidden_mse", "layer_map": "uniform_plus_last"}]}},
            ("OD", "uniform_plus_last", "monolingual", "3L"),
        ),
    ],
)
def test_udagawa2023(shape, objective, more, keys):
    assert tuple(match(shape, objective, **more).keys.values()) == keys


def test_distilbert_by_its_three_parts():
    terms = ({"kind": "output_kl"}, {"kind": "mlm_cross_entropy"}, {"kind": "hidden_cosine"})
    assert match(SIX, *terms, initialise="distilbert").keys["method"] == "DistilBERT"
    assert match(SIX, *terms) is None


@pytest.mark.parametrize(
    ("shape", "objective", "more"),
    [
        ({"hidden_size": 396}, "relation_kl", {}),
        ({"intermediate_size": 1536}, "relation_kl", {}),
        ({"num_heads": 6}, "relation_kl", {}),
        ({"family": "roberta", "vocab_size": 50265}, "relation_kl", {}),
        ({}, teacher_layer(-4), {}),
        ({}, teacher_layer(9), {}),
        ({}, {"kind": "relation_kl", "relation_heads": 12}, {}),
        ({}, {"kind": "relation_kl", "query": 0}, {}),
        ({}, {"kind": "relation_kl", "cross": {"query-key": 1.0}}, {}),
        ({}, {"kind": "hidden_mse", "tokens": "cls"}, {}),
        ({}, {"kind": "hidden_mse", "layer_map": {"strategy": "last", "embeddings": True}}, {}),
        ({}, {"kind": "hidden_mse", "layer_map": {"strategy": "explicit", "pairs": [[3, 12]]}}, {}),
        ({}, "relation_kl", {"initialise": "first_k"}),
        ({}, "relation_kl", {"stages": ["a", "b"], "before": {"a": ["hidden_mse"]}}),
        ({}, "output_kl", {}),  # OD from scratch is not in the tables
        ({}, "output_kl", {"stages": ["a", "b"]}),  # after what?
        ({}, "relation_mse", {}),
    ],
)
def test_anything_else_is_no_match(shape, objective, more):
    assert match(shape, objective, **more) is None


def test_two_terms_are_another_method():
    assert match({}, "relation_kl", "hidden_mse") is None


def test_teachers_of_another_depth_are_no_match():
    def why(teacher, known=None):
        row, said = find_published({**MODEL, "distilled": distilled("relation_kl", teacher=teacher)}, known or {})
        assert (row is None) == bool(said)
        return said

    assert "is 24" in why("google-bert/bert-large-uncased")
    assert "is not known" in why("/somewhere/mine")
    assert why("/somewhere/mine", {"mine": 12}) == ""
    assert "is 4" in why("/somewhere/tiny-base", {"tiny-base": 4})


@pytest.mark.parametrize(
    ("objective", "more", "row"),
    [
        (["output_kl", "mlm_cross_entropy"], {}, ("Vanilla KD", "random")),
        (["attention_mse"], {"initialise": "first_k"}, ("Att-MSE", "first 6")),
        (["attention_mse"], {"initialise": [1, 2, 3, 4, 5, 6]}, ("Att-MSE", "first 6")),
        ([{"kind": "hidden_mse", "tokens": "cls"}], {}, ("Hid-CLS", "random")),
        (["hidden_mse", "attention_kl"], {}, ("Att-KL+Hid-Seq", "random")),
        (
            ["attention_kl", {"kind": "relation_kl", "relation_heads": "native", "query": 0, "key": 0, "value": 1}],
            {},
            ("Att-KL+Val-KL", "random"),
        ),
        (["attention_kl"], {"initialise": "first_k"}, None),
        (["attention_mse"], {"initialise": "every_k"}, None),
        ([{"kind": "attention_mse", "layer_map": "uniform"}], {}, None),
        (["output_kl"], {}, None),
    ],
)
def test_wang2023_task_agnostic(objective, more, row):
    found = match(SIX, *objective, **more)
    assert (found and tuple(found.keys.values())[:2]) == row


def test_the_protocol_chooses_between_two_papers():
    assert match(SIX, "hidden_mse").source == "udagawa2023"
    assert match(SIX, "hidden_mse", protocol="wang2023").source == "wang2023"


def test_wang2023_task_specific():
    term = {"kind": "attention_mse", "layer_map": {"strategy": "explicit", "pairs": [[1, 1], [2, 2], [3, 3]]}}
    row = match(ROBERTA, term, teacher="FacebookAI/roberta-base", initialise=[1, 2, 3], task="rte")
    assert tuple(row.keys.values()) == ("Att-MSE", "1,2,3", "task_specific")
    assert row.scores["rte", "validation", "accuracy"] == (60.3, "table 3")
    assert not {key for key in row.scores if key[0] in ("cola", "mrpc", "glue")}  # of another metric than their heads say
    assert match(ROBERTA, term, teacher="FacebookAI/roberta-base", initialise=[1, 8, 12], task="rte") is None
    assert match(ROBERTA, term, teacher="FacebookAI/roberta-base", initialise=[1, 2, 3]) is None


def test_an_export_of_a_staged_run_knows_what_came_before(tmp_path):
    write_model(tmp_path / "run" / "export" / "x", tiny_config())
    config = {
        "teacher": "google-bert/bert-base-uncased",
        "students": {"x": {"objective": [{"kind": "hidden_mse", "layer_map": "uniform"}], "initialise": "random"}},
        "stages": {"transfer": {}, "od": {"objective": [{"kind": "output_kl"}]}},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    found = describe_model(tmp_path / "run" / "export" / "x")["distilled"]
    # The stage's objective goes over the student's own: it learnt by OD last.
    assert found["objective"] == [{"kind": "output_kl"}]
    assert found["before"] == {"transfer": [{"kind": "hidden_mse", "layer_map": "uniform"}]}
    assert find_published({**MODEL, "distilled": found}, {})[0].keys["method"] == "OD"
