"""What every command of `opd` has, and what `opd` says about itself."""

import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from opd_governor.actors.deadlines import HungError
from opd_governor.services.cli.app import app
from opd_governor.services.cli.terminal import quiet_environment
from opd_governor.services.inputs import preflight
from opd_governor.services.run.launch import Run

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


def test_an_actor_that_does_not_come_up_is_named_and_no_disk_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def never_up(*_: object, **__: object) -> AsyncIterator[Run]:
        raise HungError("waited 600.0 s for the start of an actor of teacher big, deadline 600.0 s")
        yield

    monkeypatch.setattr(preflight, "check", lambda job, out: [])
    monkeypatch.setattr(Run, "open", never_up)
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nstudent: {model: a}\nteacher: {model: b}\ndata: {prompts: {path: p}}\n")
    shown = CliRunner().invoke(app, ["run", str(job), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 1
    assert "the start of an actor of teacher big" in shown.output
    assert "--resume" not in shown.output
