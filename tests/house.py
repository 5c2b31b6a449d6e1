"""The four numbers of the house: how large a class, a constructor, a file and a function of actors/ and services/ may be.

>>> python -m tests.house
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("actors", "services")
CLASS_LINES = 250
PARAMETERS = 8
"""Of a constructor, self apart. The fields of a dataclass or a settings class are not parameters in this sense."""
FILE_LINES = 400
FUNCTION_LINES = 60


@dataclass(frozen=True, slots=True)
class Measure:
    """The size of one thing, beside the most that it may have."""

    what: str
    """class, constructor, file or function."""
    name: str
    where: str
    """FILE:LINE."""
    size: int
    most: int


def measures(path: Path, text: str) -> Iterator[Measure]:
    """Of a file and of everything in it. Decorators, docstrings and comments count."""
    yield Measure("file", path.name, f"{path}:1", len(text.splitlines()), FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            yield Measure("class", node.name, f"{path}:{node.lineno}", _lines(node), CLASS_LINES)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Measure("function", node.name, f"{path}:{node.lineno}", _lines(node), FUNCTION_LINES)
            if node.name in ("__init__", "__new__"):
                yield Measure("constructor", node.name, f"{path}:{node.lineno}", _parameters(node), PARAMETERS)


def _lines(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    of = function.args
    return len([*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]) - 1


def of_the_house() -> list[Measure]:
    """Everything in the folders."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return [measure for path in paths for measure in measures(path.relative_to(ROOT), path.read_text())]


def report(found: Sequence[Measure]) -> tuple[list[str], int]:
    """A line for each thing that is too large and one for each kind's largest; the exit code, 1 if anything is too large."""
    over = [measure for measure in found if measure.size > measure.most]
    lines = [f"{m.where}: {m.what} {m.name}: {m.size}, at most {m.most}" for m in over]
    for what, most in (("class", CLASS_LINES), ("constructor", PARAMETERS), ("file", FILE_LINES), ("function", FUNCTION_LINES)):
        largest = max((measure for measure in found if measure.what == what), key=lambda measure: measure.size)
        unit = "parameters" if what == "constructor" else "lines"
        lines.append(f"largest {what}: {largest.size} {unit} of {most} ({largest.name}, {largest.where})")
    return lines, int(bool(over))


if __name__ == "__main__":
    told, code = report(of_the_house())
    print("\n".join(told))
    sys.exit(code)
