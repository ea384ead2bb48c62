"""Imports go downward only, in the order that CONTRIBUTING.md draws."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_cartridges"
# The package's entrance gives every name lazily, so anything may be imported through it, and it may import anything.
ENTRANCE = {"__init__", "__main__", "peft_model"}


def _levels() -> dict[str, int]:
    """Name of a module or folder in the package -> its level, 0 at the bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = re.search(r"Imports go downward only.*?```\n(.*?)```", text, re.DOTALL)
    assert drawn is not None
    lines = drawn[1].strip().split("\n")[::-1]
    return {name: level for level, line in enumerate(lines) for name in re.findall(r"\w+", line)}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of this package when it is imported itself: top-level name and line. Imports in functions are
    made when something above is first used, and those for type checkers never."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = inside[: len(inside) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                top = ".".join((*folder, name)).split(".")[0]
                if top != "__version__":
                    yield top, node.lineno


def test_imports_go_downward_only() -> None:
    levels = _levels()
    upward, unknown = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        own = parts[0].removesuffix(".py")
        if own in ENTRANCE:
            continue
        if own not in levels:
            unknown.add(own)
            continue
        for name, line in _imports(path):
            if name == own or name in ENTRANCE:
                continue
            if name not in levels:
                unknown.add(name)
            elif levels[name] > levels[own]:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not unknown, f"CONTRIBUTING.md does not say where these stand: {', '.join(sorted(unknown))}"
    assert not upward, "\n".join(upward)


def test_no_circles_among_what_stands_side_by_side() -> None:
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own not in ENTRANCE:
            edges.setdefault(own, set()).update(name for name, _ in _imports(path) if name != own)

    def reaches(start: str, seen: set[str]) -> set[str]:
        for name in edges.get(start, set()) - seen:
            seen.add(name)
            reaches(name, seen)
        return seen

    assert not [name for name in edges if name in reaches(name, set())]
