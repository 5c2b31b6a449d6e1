"""What every command of `opd` has, and what `opd` says about itself."""

import logging
from importlib.metadata import version

import click
import pytest
import typer
from typer.testing import CliRunner

from opd_governor.services.cli.app import app
from opd_governor.services.cli.terminal import quiet_environment

COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_of_this_command(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert f"Example: opd {name} " in " ".join(shown.output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    assert all(parameter.help for parameter in COMMANDS[name].params if parameter.name != "help")  # type: ignore[attr-defined]


def test_the_version_names_what_it_runs_on() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"opd {version('opd-governor')} (Python 3.")
    assert f"torch {version('torch')}" in shown.output


def test_the_shell_completes_commands() -> None:
    typed = {"_OPD_COMPLETE": "complete_bash", "COMP_WORDS": "opd re", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(app, [], prog_name="opd", env=typed)
    assert completed.output.split() == [name for name in COMMANDS if name.startswith("re")]


def test_the_long_work_before_a_run_may_print_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("opd_governor")
    level = logger.level
    quiet_environment()
    try:
        assert logging.getLogger("opd_governor.services.inputs.prune").isEnabledFor(logging.INFO)
    finally:
        logger.setLevel(level)
