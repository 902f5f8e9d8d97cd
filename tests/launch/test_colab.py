"""colab.ipynb, run as Colab runs it, with a tiny teacher and text; the network is not there."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import nbclient
import nbformat
from stand_ins import LAUNCH
from waiting import PATIENCE

NOTEBOOK = LAUNCH / "colab.ipynb"


def test_is_clean():
    """Valid, with ids, no outputs, one cell of parameters."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert [cell.id for cell in book.cells if "parameters" in cell.metadata.get("tags", [])] == ["parameters"]


def printed(outputs: list) -> str:
    return "".join(output.get("text", "") for output in outputs)


def test_runs(teacher_and_text, tmp_path, monkeypatch):
    teacher, text = map(str, teacher_and_text)
    book = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in book.cells if cell.id == "parameters"]
    tiny = f'PACKAGE = "no-such-package"\nTEACHER, TEXT = {teacher!r}, {text!r}\nSTEPS, BATCH_SIZE, LENGTH = 4, 8, 16'
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert ", ".join(names).split(", ") == "PACKAGE TEACHER TEXT STEPS BATCH_SIZE LENGTH".split()
    parameters.source = tiny
    for name, value in {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(book, timeout=int(PATIENCE), kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    assert not outputs["install"]  # jaxdistill is there: pip is not asked
    pages = [output.get("data", {}).get("text/html", "") for output in outputs["distill"]]
    assert any("<progress" in page and "step 4/4" in page for page in pages)
    assert any("Distilled from" in page for page in pages)  # the table
    assert "'loss':" in outputs["distill"][-1].data["text/plain"]
    shown = [kind for output in outputs["results"] for kind in output.data]
    assert "text/markdown" in shown and "image/png" in shown
    assert ("tensor(" if find_spec("torch") else "PyTorch is not installed") in printed(outputs["pytorch"])
    assert "the run is complete: step 4" in printed(outputs["command"])
    assert (tmp_path / "runs" / "small" / "export" / "small" / "model.safetensors").exists()
