"""What every command of `opd` needs and nothing heavy does: the light distribution has it too."""

import sys
from typing import Annotated, NoReturn

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def fail(lines: list[str], code: int) -> NoReturn:
    """End the command with these lines on stderr."""
    for line in lines:
        print(f"opd: {line}", file=sys.stderr)
    raise typer.Exit(code)
