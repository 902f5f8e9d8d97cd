"""The page: whole, self-contained, escaped; the figures on it."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib.image
import pytest
from compared import MINILM, board_of, distilled, entry_of, runs, task, write_result

from jaxdistill.compare import compare
from jaxdistill.compare.figures import Point, labelled, pareto, pareto_front
from jaxdistill.compare.heat import heat_map
from jaxdistill.compare.plots import cost_plots, kept_map, lost_maps
from jaxdistill.compare.speed import choose_setting, milliseconds, setting_title

pytestmark = pytest.mark.long

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'&<img src=http://evil.example/x onerror=alert(1)>"


class Page(HTMLParser):
    """Every tag with its attributes; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(text)


def heat(**changes):
    content = {
        "title": "CKA",
        "rows_title": "student layer",
        "columns_title": "teacher layer",
        "rows": ["1", "2"],
        "columns": ["1", "2", "3"],
    }
    return content | {"values": [[0.0, 0.5, 1.0], [0.25, None, 0.75]], "low": 0, "high": 1, "note": "held-out"} | changes


def measured(seconds, framework="jax", batch_size=1, device="cpu"):
    each = {"framework": framework, "device": device, "batch_size": batch_size, "length": 128, "mean_seconds": seconds}
    return {"measurements": [each | {"deviation_seconds": seconds / 50}]}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    large = {"parameters": 110_000_000, "num_layers": 12}
    tasks = {"rte": task(runs(0.65, 0.66, 0.67)), "sst2": task(runs(0.90, 0.92, 0.91))}
    write_result(folder, "teacher", tasks, large, latency=measured(0.06))
    worse = {"rte": task(runs(0.60, 0.63, 0.61)), "sst2": task(runs(0.85, 0.86, 0.88))}
    lost = {
        "teacher": EVIL,
        "numbers": {"agreement": 0.7},
        "heatmaps": [heat()],
        "tables": [{"title": EVIL, "columns": ["a"], "rows": [[EVIL]]}],
    }
    write_result(folder, EVIL, worse, {"distilled": distilled(MINILM)}, latency=measured(0.01), lost=lost)
    write_result(folder, "unscored", None)
    return folder


def page_of(results, tmp_path, *more, **options):
    compare([str(results), *more], output=tmp_path / "out", results=tmp_path / "none", **options)
    return (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_the_page_nests_fetches_nothing_and_escapes_names(results, tmp_path):
    text = page_of(results, tmp_path, "udagawa2023:3L")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "use", "base", "form", "object"})
    for _, attributes in page.tags:
        assert attributes.get("href", "data:").startswith("data:")
        assert not {"src", "xlink:href", "onerror", "onclick", "onload", "srcset"} & set(attributes)
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme:dark" in style
    assert re.search(r"<script>(.*?)</script>", text, re.S).group(1).count("http") == 0
    words = "".join(page.words)
    assert EVIL in words  # as text, once a browser has read it
    assert '<meta name="viewport"' in text
    assert str(tmp_path) not in text and "/home/someone" not in text


def test_the_page_goes_from_what_matters_most(results, tmp_path):
    text = page_of(results, tmp_path)
    parts = ["teacher, the reference, scores best of 2 models", "<h2>Scores</h2>", "<h2>Score against cost</h2>", "What is kept of teacher"]
    parts += ["<h2>In detail</h2>", "<h2>What is lost</h2>", "Notes and what is missing", "How it was made", "Published values"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    words = "".join(Page(text).words)
    assert "published 55.1" in words and "unscored: no scores" in words
    assert "EMNLP 2023" in words and "jaxdistill compare" in words


def test_cells_carry_the_numbers_that_a_click_sorts_by(results, tmp_path):
    page = Page(page_of(results, tmp_path))
    numbers = [attributes["data-v"] for tag, attributes in page.tags if tag == "td" and attributes.get("data-v")]
    assert "66.0000" in numbers and "110000000" in numbers
    heads = [tag for tag, _ in page.tags].count("button")
    assert heads == 6  # model, parameters, latency, average, two tasks
    assert any(attributes.get("title", "").startswith("-4.7 to teacher, p ") for tag, attributes in page.tags if tag == "td")


def test_twenty_models_are_less_than_two_megabytes(tmp_path):
    heads = [f"{i}.1" for i in range(144)]
    every = heat(rows=heads[:72], columns=heads, values=[[i * j % 97 / 97 for i in range(144)] for j in range(72)])
    maps = [every] + [heat(rows=[str(i) for i in range(6)], columns=[str(i) for i in range(12)], values=[[0.5] * 12] * 6)] * 5
    for i in range(20):
        tasks = {name: task(runs(0.6 + i / 100, 0.61, 0.62)) for name in ("sst2", "qnli", "rte", "qqp")}
        write_result(
            tmp_path / "results", f"model-{i}", tasks, {"parameters": 10**7 + i}, lost={"heatmaps": maps}, latency=measured(0.01 + i)
        )
    assert len(page_of(tmp_path / "results", tmp_path, "udagawa2023").encode()) < 2e6


def test_pareto_front_by_hand():
    points = [Point("a", 1, 50), Point("b", 2, 70), Point("c", 3, 60), Point("d", 3, 80), Point("e", 1, 40), Point("f", 4, 80)]
    assert [point.name for point in pareto_front(points)] == ["a", "b", "d"]


def test_labels_of_a_plot_cover_neither_each_other_nor_points():
    points = [Point(f"6L.minilmv2-minus_{i}", 20 + i % 4, 80 + i / 5 + i % 4, error=0.3, published=i > 12) for i in range(16)]
    svg = pareto(points, "Parameters", "GLUE")
    boxes = []
    for match in re.finditer(r'<text class="label \w+" x="([\d.]+)" y="([\d.]+)" text-anchor="middle">([^<]+)', svg):
        x, y, width = float(match[1]), float(match[2]), 7.0 * len(match[3])
        boxes.append((x - width / 2, y - 11, x + width / 2, y + 4))
    assert len(boxes) == 16
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left and right <= 900 and 0 <= top and bottom <= 500
        assert not any(left < x < right and top < y < bottom for x, y in dots)
        for other in boxes[:i]:
            assert not (min(right, other[2]) - max(left, other[0]) > 0.5 and min(bottom, other[3]) - max(top, other[1]) > 0.5)
    assert svg.count('<polyline class="front"') == 1 and svg.count('<g class="point published">') == 3


def test_of_many_points_ours_and_the_front_have_labels():
    points = [Point(f"p{i}", i + 1, 90 - i if i else 95, published=True) for i in range(40)] + [Point("ours", 5, 10)]
    assert {point.name for point in labelled(points)} == {"ours", "p0"}


def test_a_plot_of_equal_scores_and_one_of_a_single_score():
    assert "NaN" not in pareto([Point("a", 1, 50.0), Point("b", 2, 50.0)], "x", "y")
    assert "inf" not in pareto([Point("a", 1, 0.0), Point("b", 100, 0.0)], "x", "y")


def test_heat_map_shows_every_value_and_leaves_gaps_open():
    svg = heat_map(heat())
    fills = re.findall(r'<path (?:class="(open)"|fill="(#\w+)")', svg)
    assert len(fills) == 6 and fills[0] == ("", "#f3f7fb") and fills[2] == ("", "#00304d")
    assert fills[4] == ("open", "") and "2, 2: no value" in svg
    digits = re.findall(r'<text (class="\w+" )?x="\d+">([\d.]+|&#8211;)<', svg)
    assert [number for _, number in digits] == ["0.00", "0.50", "1.00", "0.25", "&#8211;", "0.75"]
    assert digits[0][0] == "" and digits[2][0] == 'class="w" '  # white on the dark
    wide = heat_map(heat(columns=[str(i) for i in range(20)], values=[[0.5] * 20] * 2))
    assert "<title>2, 19: 0.5</title>" in wide and 'class="w"' not in wide  # too many for digits
    assert svg.count("student layer") == 1 and svg.count("teacher layer") == 1


def test_thousands_of_cells_are_a_picture_inside_the_page():
    rows, columns = [f"{i}.1" for i in range(36)], [f"{i}.1" for i in range(144)]
    values = [[0.0] * 144 for _ in rows]
    values[1][2], values[0][3] = 1.0, None
    svg = heat_map(heat(rows=rows, columns=columns, values=values))
    (code,) = re.findall(r'<image [^>]*href="data:image/png;base64,([^"]+)"', svg)
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(code)))
    assert picture.shape == (36, 144, 4)
    assert picture[0, 3, 3] == 0  # no number, no colour
    assert (picture[1, 2] * 255).round().tolist() == [0x00, 0x30, 0x4D, 255]
    assert svg.count("<path") == 0 and len(svg) < 20_000
    # What is shown of the labels does not run into the next one.
    shown = [float(y) for y in re.findall(r'<text class="tick" x="[\d.]+" y="([\d.]+)" text-anchor="end">\d', svg)][:-1]
    assert len(shown) > 10 and min(b - a for a, b in pairwise(shown)) >= 14


def test_a_heat_map_that_does_not_fit_is_named(tmp_path):
    write_result(tmp_path, "x", None, lost={"heatmaps": [heat(values=[[1.0]]), heat()]})
    broken, whole = lost_maps(entry_of(board_of(tmp_path), "x"))
    assert broken[2] == "" and "run `jaxdistill lost` again" in broken[1]
    assert whole[2].startswith("<svg")


def test_latency_of_the_setting_that_most_have(tmp_path):
    write_result(tmp_path, "a", None, latency={"measurements": [*measured(1.0)["measurements"], *measured(2.0, "pytorch")["measurements"]]})
    write_result(
        tmp_path, "b", None, latency={"measurements": [*measured(3.0)["measurements"], *measured(3.0, batch_size=32)["measurements"]]}
    )
    for name in "cde":
        write_result(tmp_path, name, None, latency=measured(1.0, "pytorch", 32, "cuda"))
    assert choose_setting(board_of(tmp_path).measured)[:4] == ("jax", "cpu", 1, 128)
    for name in "fg":
        write_result(tmp_path, name, None, latency=measured(1.0, "pytorch", 32, "cuda"))
    assert choose_setting(board_of(tmp_path).measured)[:4] == ("pytorch", "cuda", 32, 128)  # two of seven are too few


def test_of_two_frameworks_jax_stands_for_the_models(tmp_path):
    both = {"measurements": [*measured(1.0)["measurements"], *measured(2.0, "pytorch")["measurements"]]}
    write_result(tmp_path, "a", None, latency=both)
    write_result(tmp_path, "b", None, latency=measured(2.0, "pytorch"))
    assert choose_setting(board_of(tmp_path).measured)[:4] == ("jax", "cpu", 1, 128)


def test_latencies_of_two_dtypes_do_not_stand_in_one_column(tmp_path):
    for name, dtype, milliseconds_each in (("a", "float32", 4.0), ("b", "float32", 2.0), ("c", "bfloat16", 1.0)):
        write_result(tmp_path, name, None, latency=measured(milliseconds_each) | {"dtype": dtype})
    board = board_of(tmp_path)
    setting = choose_setting(board.measured)
    assert setting[4] == "float32" and "float32" in setting_title(setting)
    assert milliseconds(entry_of(board, "b"), setting) is not None and milliseconds(entry_of(board, "c"), setting) is None


def test_published_points_are_hollow_and_their_latency_is_not_ours(results):
    shown = {title: (note, svg) for title, note, svg in cost_plots(board_of(results, "udagawa2023:3L:monolingual"))}
    note, svg = shown["GLUE without CoLA against latency"]
    assert "other machines" in note and "point published" not in svg and svg.count("<circle") == 2
    note, svg = shown["GLUE without CoLA against parameters"]
    assert "Hollow" in note and svg.count('class="point published"') == 4  # those with these tasks
    alone = {title: svg for title, _, svg in cost_plots(board_of("udagawa2023:monolingual"))}
    assert "CPU of the paper" in alone["GLUE without CoLA against latency"]


def test_what_is_kept_of_the_reference(results):
    title, _, svg = kept_map(board_of(results))
    assert title == "What is kept of teacher"
    # 73.9 of 78.5 on average, 86.3 of 91 and 61.3 of 66.
    assert re.findall(r'<text (?:class="w" )?x="\d+">(\d+)<', svg) == ["94", "95", "93"]
