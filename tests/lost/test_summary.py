"""Numbers, sentences and pictures from measurements made by hand: the teacher has 4 blocks of 2 heads, the student 2 of 2."""

from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from jaxdistill.lost import pictures
from jaxdistill.lost.answers import answers
from jaxdistill.lost.comparison import Measured
from jaxdistill.lost.summary import Summary, length_buckets

LENGTHS = np.array([10, 10, 30, 30])
CKA = np.array([[0.9, 0.3, 0.2, 0.2, 0.1], [0.2, 0.5, 0.8, 0.4, 0.1], [0.1, 0.2, 0.3, 0.6, 0.95]])


def made(**changes):
    rng = np.random.default_rng(0)
    overlap = np.full((4, 2, 2, 4, 2), 0.1) * LENGTHS[:, None, None, None, None]
    overlap[:, 0, 1, 1, 0] = 0.9 * LENGTHS  # student head 1.2 does what teacher head 2.1 does
    overlap[:, 1, 0, 3] = 0.7 * LENGTHS[:, None]  # 2.1 what both of layer 4 do, but one of those is flat anyway
    uniform = np.full((4, 4, 2), 0.2) * LENGTHS[:, None, None]
    uniform[:, 3, 1] = 0.68 * LENGTHS
    relations = np.full((4, 3, 6, 2, 4), 0.3)
    relations[..., 1, 2] = np.array([0.8, 0.8, 0.4, 0.4])[:, None, None]  # last block like block 3, less so in long rows
    kl = np.full((4, 3, 6, 2, 4), 0.5) * LENGTHS[:, None, None, None, None]
    vectors = rng.normal(size=(4, 5))
    measured = Measured(
        cka=CKA,
        group_cka={"": 0.9, "1-16 tokens": 0.95, "17-32 tokens": 0.6, "de": 0.5, "en": None},
        overlap=overlap,
        uniform=uniform,
        relation_overlap=relations * LENGTHS[:, None, None, None, None],
        relation_kl=kl,
        sentences={"cls": (vectors, vectors), "mean": (-vectors, vectors @ rng.normal(size=(5, 3)))},
        mlm=np.array([[2, 1, 2, 1, 0], [2, 1, 2, 1, 0], [4, 0, 1, 2, 1], [4, 0, 1, 2, 1]]),
    )
    languages = changes.pop("languages", ["", "", "", ""])
    return Summary(replace(measured, **changes), LENGTHS, length_buckets(LENGTHS.tolist()), languages)


def test_length_buckets():
    assert length_buckets([1, 16, 17, 32, 33, 128, 129]) == [
        "1-16 tokens", "1-16 tokens", "17-32 tokens", "17-32 tokens", "33-64 tokens", "65-128 tokens", "129-256 tokens",
    ]  # fmt: skip


def test_numbers():
    numbers = made().numbers()
    relations = (20 * 0.8 + 60 * 0.4) / 80  # a long row counts for its tokens
    assert numbers == {
        "cka_embeddings": 0.9, "cka_last": 0.95, "cka_last_debiased": 0.9, "cka_blocks_best_mean": 0.875,
        "relation_teacher_layer": 3, "relation_overlap": pytest.approx(relations), "relation_kl": 0.5,
        "attention_heads": 8, "attention_heads_with_counterpart": 2, "attention_best_overlap": pytest.approx((0.9 + 2 * 0.7 + 5 * 0.1) / 8),
        "attention_even_overlap": pytest.approx((7 * 0.2 + 0.68) / 8), "similarity_cls": 1.0, "similarity_mean": numbers["similarity_mean"],
        "mlm_places": 12, "mlm_top1": 0.1667, "mlm_top5": 0.5, "mlm_teacher_right": 0.5, "mlm_student_right": 0.1667,
    }  # fmt: skip
    assert -1 < numbers["similarity_mean"] < 1
    without = made(mlm=None).numbers()
    assert not any(name.startswith("mlm") for name in without) and len(without) == len(numbers) - 5


def test_breakdowns():
    summary = made(languages=["de", "de", "de", "en"])
    short, long = summary.by_length.values()
    assert (short["rows"], short["tokens"], long["rows"], long["tokens"]) == (2, 20, 2, 60)
    assert (short["relations"], long["relations"]) == (pytest.approx(0.8), pytest.approx(0.4))
    assert (short["MLM top-1"], long["MLM top-1"], long["MLM top-5"]) == (0.5, 0.0, 0.25)
    assert short["CLS similarity"] is None  # 2 rows have no ranking
    assert summary.by_language["de"]["CLS similarity"] == 1.0
    assert list(summary.by_language) == ["de", "en"] and summary.by_language["en"]["CKA, last layer"] is None
    tables = {table["title"]: table for table in summary.tables()}
    assert tables["By language"]["rows"][1][:4] == ["en", 1, 30, None]
    assert tables["By length"]["rows"][-1][0] == "all rows"
    assert tables["Attention heads of the teacher"]["rows"][3] == [4, 1, 2, 0.7, 0.44]
    assert tables["Layers"]["rows"][1][:6] == [2, 4, 0.95, 3, 0.5, 0.5]
    assert "By language" not in {table["title"] for table in made().tables()}


def test_answers():
    text = " ".join(answers(made()))
    for part in (
        "1 like teacher layer 2 (CKA 0.80), 2 like teacher layer 4 (CKA 0.95).",
        "the embeddings have CKA 0.90 with the teacher's, the first layer 0.50 with its first; the last layer has CKA 0.95",
        "and resembles no other one more.",
        "lie evenly over the teacher's: all within half a step of 2, 4.",
        "no student layer resembles much is 1 (best CKA 0.50)",
        "those of the teacher's block 3: queries 0.50 (KL 0.500)",
        "Of the teacher's 8 attention heads 2 have a counterpart",
        ": 2 of the student's 4 heads;",
        "in the teacher's layer 1 (2 of 2), layer 3 (2 of 2), layer 2 (1 of 2).",
        "by [CLS] (Spearman, 1: the same)",
        "Of 12 masked places the student's first guess is the teacher's at 17%",
        "CKA of the last layer falls (0.95 at 1-16 tokens, 0.60 at 17-32 tokens)",
    ):
        assert part in text, (part, text)
    assert "language" not in text


def test_answers_of_other_students():
    cka = CKA[:, ::-1].copy()
    text = " ".join(answers(made(cka=cka, mlm=None, overlap=made().measured.overlap * 0.1)))
    assert "2 like the teacher's embeddings (CKA 0.95)" in text
    assert "the last layer has CKA 0.10 with the teacher's last, but 0.95 with the teacher's embeddings" in text
    assert "do not lie evenly over the teacher's (2, 4 would): up to 4.0 off, not all in the teacher's order" in text
    assert "Of the teacher's 8 attention heads none have a counterpart" in text and "Most heads" not in text
    assert "masked places" not in text
    groups = {"": 0.9, "de": 0.5, "en": 0.7, "1-16 tokens": 0.8, "17-32 tokens": 0.81}
    text = " ".join(answers(made(languages=["de", "de", "en", "en"], group_cka=groups)))
    assert "By language the CKA of the last layer is highest for en (0.70) and lowest for de (0.50)." in text
    assert "CKA of the last layer is much the same (0.80 at 1-16 tokens, 0.81 at 17-32 tokens)" in text


def test_heatmaps_have_their_labels():
    maps = {each["title"]: each for each in made().heatmaps()}
    assert len(maps) == 7
    for each in maps.values():
        assert np.shape(each["values"]) == (len(each["rows"]), len(each["columns"])), each["title"]
        assert {"rows_title", "columns_title", "low", "high", "note"} <= set(each)
        assert np.max(each["values"]) <= each["high"]
    heads = maps["Attention, head by head"]
    assert heads["rows"] == ["1.1", "1.2", "2.1", "2.2"] and heads["columns"][:3] == ["1.1", "1.2", "2.1"]
    assert heads["values"][heads["rows"].index("1.2")][heads["columns"].index("2.1")] == 0.9
    assert maps["Attention heads, best match"]["values"][0][1] == 0.5  # of 2.1 0.9, of 2.2 0.1
    assert maps["CKA of hidden states"]["values"][2][4] == 0.95 and maps["CKA of hidden states"]["rows"] == ["0", "1", "2"]


def test_pictures(tmp_path, monkeypatch):
    drawn = []

    class Kept(pictures.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            drawn.append(self)

    monkeypatch.setattr(pictures, "Figure", Kept)
    columns = [f"{layer}.{head}" for layer in range(1, 13) for head in range(1, 13)]
    values = [[0.5] * 144, [None] * 144]
    names = {"rows_title": "student layer", "columns_title": "teacher layer.head", "low": 0, "high": 1, "note": "Note. " * 30}
    wide = {"title": "Heads $x$", "rows": ["1", "2"], "columns": columns, "values": values} | names
    small = {"title": "CKA / all", "rows": ["0", "1"], "columns": ["0", "1"], "values": [[1.0, 0.25], [None, 0.0]]} | names
    paths = pictures.draw_all([wide, small], tmp_path / "maps", "a student with a long name against its teacher")
    assert [path.name for path in paths] == ["heads-x.png", "cka-all.png"] == sorted(p.name for p in (tmp_path / "maps").iterdir())[::-1]
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(map(str, range(1, 13)))  # layers: 144 labels would not fit
    assert axes.get_xlabel() == "teacher layer, 12 heads each"
    assert [text.get_text() for text in drawn[1].axes[0].texts] == ["1.00", "0.25", "0.00"]
    for path, figure in zip(paths, drawn, strict=True):
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] >= 900
        box = figure.axes[0].title.get_window_extent()
        assert box.x1 <= picture.shape[1] and box.y1 <= picture.shape[0]
