"""The plan of the house, read off the imports: what each room may know."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxdistill"
# From left to right; a module imports only from its left (and from its own room).
FLOW = [
    ["redaction", "shapes"], ["errors", "urls"], ["processes"], ["faults"], ["features", "layer_map", "row_keys"], ["config"],
    ["sharding", "stages"], ["losses"], ["kernels"], ["models"],
    ["students", "data", "parts"], ["results", "tasks"], ["terms"], ["objective", "optimizer"], ["update"], ["train_step"],
    ["flops", "metrics", "progress", "runtime"], ["report"], ["implementations", "revisions"], ["resolve"],
    ["state", "batches"], ["checkpoint", "output", "plan"], ["card"], ["export", "agreement", "recorder", "inspect", "hosts"],
    ["diverged", "text"],
    ["distill", "latency", "lost", "finetune", "compare"], ["evaluate", "hub"],
    ["quickstart"], ["cli"],
]  # fmt: skip
ONLY_IN = {
    "flax": {"models"},
    "datasets": {"data", "tasks"},
    "tokenizers": {"data"},
    "transformers": {"data", "latency"},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "typer": {"cli"},
    "torch": {"latency"},  # inside the one function that times it
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module != "jaxdistill" else {f"jaxdistill.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def modules() -> dict[Path, str]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {path: path.relative_to(PACKAGE).with_suffix("").parts[0] for path in paths}


def test_imports_follow_the_flow():
    position = {name: i for i, names in enumerate(FLOW) for name in names}
    assert set(modules().values()) == set(position)
    for path, own in modules().items():
        for module in imports(path):
            if module.startswith("jaxdistill.") and room(module) != own:
                assert position[room(module)] < position[own], f"{path.name} imports {module}, which is not on its left"


def test_libraries_stay_in_their_rooms():
    for path, own in modules().items():
        for module in imports(path):
            allowed = ONLY_IN.get(module.split(".")[0])
            assert allowed is None or own in allowed, f"{path} imports {module}"


def test_pytorch_is_imported_only_when_it_is_timed():
    for path in modules():
        top = ast.Module([node for node in ast.parse(path.read_text(encoding="utf-8")).body if not isinstance(node, ast.FunctionDef)], [])
        names = {alias.name for node in ast.walk(top) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(top) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names if name} & {"torch", "transformers"}, path


def test_no_file_and_no_function_is_too_long():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
