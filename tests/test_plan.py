"""The floor plan: which room may import which. Arrows run one way, no program imports a program, and the product knows
of the paper people by model/builtin.py alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "train", "train_online", "train_scorer", "train_concept", "rounds", "build_dataset", "generate", "evaluate",
    "score", "study")
MAY_IMPORT = {             # besides its own files; from the ground up
    "losses": (), "model": ("sampling.schedule",), "sampling": ("model.errors",),
    "pictures": ("model.errors", "model.files"), "cli": ("model.errors", "model.files"),
    "dataset": ("model", "sampling", "pictures"), "training": ("model", "losses", "sampling", "dataset", "pictures"),
    "evaluation": ("model", "losses", "sampling", "dataset", "pictures")}
EVERYTHING = (*MAY_IMPORT, *PROGRAMS, "paper_people")
MAY_IMPORT |= dict.fromkeys((*PROGRAMS, "paper_people"), tuple(MAY_IMPORT))
FILES = [path for room in EVERYTHING for path in sorted([*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")])]


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of what a file imports of the project, from wherever in it; not what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name for name in names if name.split(".")[0] in EVERYTHING)
        yield from imports(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        assert name.split(".")[0] == room or any(
            name == below or name.startswith(f"{below}.") for below in MAY_IMPORT[room]), f"{path} imports {name}"
    if room not in PROGRAMS:
        functions = [node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        needed = [arg.arg for f in functions for arg in f.args[:len(f.args) - len(f.defaults)]]
        assert "args" not in needed, f"{path}: a function outside a program takes `args`; which options does it need?"
