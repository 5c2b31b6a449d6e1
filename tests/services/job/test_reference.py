"""The job file's reference is what its program writes, and names every key."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from opd_governor.actors.learner.settings import LoraSettings
from opd_governor.actors.settings import FollowSettings
from opd_governor.services.job.reference import PAGE, render
from opd_governor.services.job.settings import Job, StudentSettings, TeacherSettings
from opd_governor.services.job.tunables import Tunables


def test_the_page_is_what_its_program_writes() -> None:
    # In a process of its own: here other tests may have added parts, and the page lists the parts of this package.
    program = "from opd_governor.services.job.reference import render; print(render(), end='')"
    rendered = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert PAGE.read_text() == rendered, "run: make docs"


def test_every_group_of_the_job_file_has_a_heading_and_every_key_a_row() -> None:
    page = render()
    for group, field in Job.model_fields.items():
        settings = getattr(field.annotation, "model_fields", None)
        for key in settings or ():
            assert f"## {group}" in page
            assert f"| `{key}`" in page or f"## {group}.{key}" in page
    for group, model in (("student", StudentSettings), ("teacher", TeacherSettings)):
        assert all(f"| `{key}`" in page or f"## {group}.{key}" in page for key in model.model_fields)


def test_a_key_that_may_change_while_a_run_goes_on_is_marked() -> None:
    page = render()
    assert "| `max_new_tokens` † |" in page
    assert "| `learning_rate` † |" in page
    assert "| `total_steps` |" in page
    assert page.count(" † |") == _leaves(Tunables)


def _leaves(model: type) -> int:
    groups = [getattr(field.annotation, "model_fields", None) and field.annotation for field in model.model_fields.values()]  # type: ignore[attr-defined]
    return sum(_leaves(group) if group else 1 for group in groups)


def test_the_defaults_on_the_page_are_those_of_a_job_that_sets_nothing() -> None:
    given = {"name": "a", "student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": {"path": "c"}}}
    job = Job.model_validate(given).model_dump(mode="json")
    assert job["student"]["lora"] is None, "a group that is left out; with nothing in it, it has these defaults"
    job["student"]["lora"] = LoraSettings().model_dump(mode="json")
    job["teacher"][0]["follow"] = dict.fromkeys(FollowSettings.model_fields)
    for group, key, default in _rows():
        value: Any = job
        for part in [*group.split("."), key] if group != "top level" else [key]:
            value = (value[0] if isinstance(value, list) else value)[part]
            if value is None:
                break  # a group that a job need not have: its defaults hold once it is there
        if value is None and group in ("objective.reward", "environment"):
            continue
        if default != "required":
            assert yaml.safe_load(default.strip("`")) == value, (group, key)


def _rows() -> Iterator[tuple[str, str, str]]:
    """(group, key, default) of each row of the page."""
    group = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif line.startswith("| `") and group:
            key, _, default, _ = re.split(r" (?<!\\)\| ", line.removeprefix("| "), maxsplit=3)
            yield group, key.split("`")[1], default
