"""Models side by side, and beside what was published: Markdown, CSV and a page to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.compare.board import Board, make_board
from jaxdistill.compare.entries import read_inputs
from jaxdistill.compare.headline import headline, how_made, sources
from jaxdistill.compare.page import html_page
from jaxdistill.compare.table import csv_text, main_table, markdown
from jaxdistill.errors import InputError

__all__ = ["FILES", "Board", "compare", "main_table"]

FILES = ("comparison.md", "comparison.csv", "index.html")


def compare(
    inputs: Sequence[str],
    *,
    output: Path = Path("comparison"),
    results: Path = Path("results"),
    reference: str | None = None,
    overwrite: bool = False,
) -> Board:
    """Write comparison.md, comparison.csv and index.html into `output`; everything is checked before anything is written.

    Args:
      inputs: folders of results, files of results, run folders, model folders, and published tables by name
        (`udagawa2023`, `udagawa2023:3L:monolingual`, `wang2023:task_agnostic`).
      results: where the scores of runs and model folders are looked up by the hash of their weights.
      reference: the model that the others are tested against; default: the one with the most parameters.

    Raises:
      InputError: an input that cannot be read, an unknown reference, or an output that is there already.
    """
    if not inputs:
        raise InputError("nothing to compare: name results, runs, model folders or a published table (udagawa2023, wang2023)")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: a file, not a folder; name another --output")
    there = [name for name in FILES if (output / name).exists()]
    if there and not overwrite:
        raise InputError(f"{output}: holds {', '.join(there)}; name another --output, or give --overwrite")
    board = make_board(read_inputs(inputs, results), reference)
    said = (headline(board), how_made(board, inputs, results, output, reference), sources(board))
    texts = (markdown(board, *said), csv_text(board), html_page(board, *said))
    output.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        temporary = output / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output / name)
    return board
