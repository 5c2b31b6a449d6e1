"""What the pages name exists: commands and options, make targets, files, links and anchors; the README is short and its job is a job."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import yaml

from opd_governor.services.cli.app import app
from opd_governor.services.job.settings import Job
from opd_governor.services.record.rundir import read_records
from opd_governor.services.report.report import summarise_run

ROOT = Path(__file__).parent.parent
FOLDERS = ("actors", "services", "deploy", "docker", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md") if "texts" not in page.parts)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def code(page: Path) -> list[str]:
    """Every line of code on a page: of fenced blocks, and each span between backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for block in blocks for line in block.splitlines()] + spans


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every link and picture that stays in this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in code(page):
        for name, rest in re.findall(r"(?:^|[\s$/])opd ([a-z][a-z-]*)([^|]*)", line):
            assert name in COMMANDS, f"{page.name}: opd {name}"
            known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest.split("&&")[0].split("#")[0]))
            assert named <= known, f"{page.name}: opd {name} {named - known}"


@each_page
def test_make_targets_exist(page: Path) -> None:
    named = {name for line in code(page) for name in re.findall(r"\bmake ([a-z][a-z-]*)", line)}
    assert named <= make_targets(), f"{page.name}: make {named - make_targets()}"


@each_page
def test_files_that_commands_name_exist(page: Path) -> None:
    for line in code(page):
        for path in re.findall(r"(?:pytest|python) ((?:tests|deploy)/\S+)", line):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for module in re.findall(r"python -m ((?:tests|deploy)\.\S+)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name}: {module}"


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_nothing_names_a_folder_of_one_machine(folder: str) -> None:
    files = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
    texts = [file for file in files if file.suffix in (".md", ".py", ".yaml", ".yml", ".toml", ".txt", ".sh") and file != Path(__file__)]
    found = [str(file) for file in texts if re.search(r"(?<![\w.])/(?:work|root|Users)/\w", file.read_text())]
    assert not found


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")]
    lost = {str(page.relative_to(ROOT)) for page in PAGES if page.name == "README.md" and page not in reached}
    assert not lost, f"add a row under 'Where to read on' of README.md for {lost}"


def test_the_readme_is_short_and_begins_with_what_a_newcomer_needs() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:30])
    assert "make run" in first
    assert "make test" in first
    assert "![" in first
    assert "opd init --student" in "\n".join(lines[:40])


def test_the_readme_shows_what_the_kept_quickstart_printed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy/jobs/sums.yaml", tmp_path / "job.yaml")
    records = read_records(ROOT / "tests/bench/quickstart/metrics.jsonl")
    # Decisions are not kept beside the records, so the last clause of the sentence is not compared.
    assert f"\n{summarise_run(tmp_path, records)[0].removesuffix('.')}; the governor acted at" in (ROOT / "README.md").read_text()


def test_the_readme_has_a_job_of_ten_lines_that_validates() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 10
    assert Job.model_validate(yaml.safe_load(block)).preset == "governed"


def test_every_kind_of_part_has_a_row_in_contributing() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for file in (file for folder in ("actors", "services") for file in (ROOT / folder).rglob("*.py")):
        for kind, what in re.findall(r'^([A-Z_]+): Kind\[.*\] = Kind\("(.*)"\)$', file.read_text(), re.MULTILINE):
            rows = [line for line in page.splitlines() if f"`{kind}`" in line]
            assert any(f"({file.relative_to(ROOT)})" in row for row in rows), (
                f"{kind} ({what}) of {file.relative_to(ROOT)}: add a row to the table of CONTRIBUTING.md"
            )


def test_the_examples_of_contributing_add_their_parts(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks):
        file = tmp_path / f"example_{number}.py"
        (kind, name), *_ = re.findall(r'\b([A-Z_]+)\.add\("(\w+)"\)', block)
        (module,) = re.findall(rf"from (\S+) import .*\b{kind}\b", block)
        file.write_text(block)
        # In a process of its own, so that other tests do not meet the example's parts.
        program = f"from {module} import {kind}; assert {name!r} in {kind}"
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "OPD_EXTENSIONS": str(file)}, check=True)
    assert blocks


def test_the_plan_of_the_code_names_every_room_and_its_arrows() -> None:
    page = (ROOT / "services/README.md").read_text()
    contract, *_ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    arrows = " > ".join(layer.replace("opd_governor.services.", "").replace("opd_governor.", "") for layer in contract["layers"])
    assert f"\n{arrows}\n" in page, f"services/README.md: the arrows are {arrows}"
    rooms = {f"{room.parent.name}/" for room in (ROOT / "services").glob("*/__init__.py")}
    rooms |= {f"actors/{room.parent.name}/" for room in (ROOT / "actors").glob("*/__init__.py")}
    missing = {room for room in rooms if f"| `{room}` |" not in page}
    assert not missing, f"add a row to services/README.md for {missing}"


def test_make_help_lists_every_target_that_a_person_calls() -> None:
    helped = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make_targets() - helped == {"packages"}
