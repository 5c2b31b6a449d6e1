"""One finding about a job, and how findings are shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `detail` of a failure names the field, or file and line; `remedy` says what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    exit_code: Literal[2, 3] = 3
    """2: a mistake in the job's own files; 3: the world is not as the job needs it."""

    def line(self) -> str:
        """As one line."""
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def failures(checks: Sequence[Check]) -> list[str]:
    """One line per failure."""
    return [found.line() for found in checks if found.status == "fail"]


def exit_code(checks: Sequence[Check]) -> int:
    """0 without failures; 2 when one is a mistake in the job's own files, else 3."""
    return min((found.exit_code for found in checks if found.status == "fail"), default=0)


def render(checks: Sequence[Check]) -> str:
    """A table: what was checked, how it stands, what to do."""
    table = Table("check", "status", "found", "remedy", show_lines=False)
    colours = {"pass": "green", "warn": "yellow", "fail": "red"}
    for found in checks:
        table.add_row(found.name, f"[{colours[found.status]}]{found.status}[/]", _escape(found.detail), _escape(found.remedy))
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
