"""A job names a file, and its parts are added to their kinds: in this process, and through the environment in others."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from opd_governor.actors import extensions
from opd_governor.actors.extensions import ExtensionError, Kind, use_extensions
from opd_governor.actors.governor.actuators import ACTUATORS, Actuator
from opd_governor.services.job.trackers import TRACKERS
from tests.strangers import own_parts

COLOURS: Kind[int] = Kind("colour")
COLOURS.add("red")(1)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extensions.VARIABLE, "")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ExtensionError, match="colour 'red' exists already"):
        COLOURS.add("red")(2)


def test_a_field_takes_known_names_and_names_the_nearest() -> None:
    field = TypeAdapter(Annotated[str, COLOURS.key])
    assert field.validate_python("red") == "red"
    with pytest.raises(ValidationError, match=r"no such colour; did you mean red\?"):
        field.validate_python("redd")
    assert field.json_schema()["enum"] == ["red"]


def test_a_file_of_a_strangers_is_imported_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import builtins\nbuiltins.opd_count = getattr(builtins, 'opd_count', 0) + 1\n")
    use_extensions([str(file)])
    use_extensions([str(file)])
    code = "import builtins; from opd_governor.actors.extensions import load_extensions; load_extensions(); print(builtins.opd_count)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "no such file"),
        ("broken.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("syntax.py", "def", "SyntaxError"),
        ("leaves.py", "raise SystemExit(3)", "SystemExit: 3"),
        ("lines.py", "raise ValueError('one\\ntwo')", "ValueError: one two"),
    ],
)
def test_what_does_not_load_is_one_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ExtensionError, match=says) as caught:
        use_extensions([str(tmp_path / name)])
    assert "\n" not in str(caught.value)


MINE = "from opd_governor.services.job.trackers import TRACKERS\n\n@TRACKERS.add({name!r})\nclass {title}:\n    package = 'json'\n"


def test_files_of_the_same_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "parts.py").write_text(MINE.format(name=name, title=name.title()))
    with own_parts():
        use_extensions([str(tmp_path / name / "parts.py") for name in ("one", "two")])
        assert [pickle.loads(pickle.dumps(TRACKERS[name])).__name__ for name in ("one", "two")] == ["One", "Two"]


def test_a_file_that_fails_half_way_leaves_no_part_and_can_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with own_parts():
        for _ in range(2):
            file.write_text(MINE.format(name="half", title="Half") + "1 / 0\n")
            with pytest.raises(ExtensionError, match="ZeroDivisionError"):
                use_extensions([str(file)])
        file.write_text(MINE.format(name="half", title="Half"))
        use_extensions([str(file)])
        assert TRACKERS["half"].__name__ == "Half"


@pytest.mark.parametrize(
    ("name", "says"),
    [("./mine", "names no module"), ("", "names no module"), (f"a{os.pathsep}b/mine.py", f"a path must not contain '{os.pathsep}'")],
)
def test_a_name_that_is_neither_file_nor_module_is_refused(name: str, says: str) -> None:
    with pytest.raises(ExtensionError, match=says):
        use_extensions([name])
    assert os.environ[extensions.VARIABLE] == ""


@pytest.mark.parametrize("name", ["my-knob", "a b", "", "generation", "extra"])
def test_an_actuators_name_can_be_a_metrics_and_none_of_the_limits_own(name: str) -> None:
    with own_parts(), pytest.raises(ExtensionError, match="give yours"):
        ACTUATORS.add(name)(Actuator(title="a", unit="", help="", tighter="up", bound=1.0))


@pytest.mark.parametrize("wrong", [{"stage": (1.0, 1.0)}, {"stage": (0.5, 0.2)}, {"in_recovery": 2.0}])
def test_an_actuator_that_the_law_cannot_follow_is_refused_where_it_is_declared(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="actuator 'a': "):
        Actuator(title="a", unit="", help="", tighter="up", bound=1.0, **wrong)  # type: ignore[arg-type]


def test_an_installed_distribution_adds_its_parts_and_one_that_breaks_says_which_every_time(tmp_path: Path) -> None:
    info = tmp_path / "acme_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[opd_governor.extensions]\nacme = acme_parts\n")
    program = (
        "from opd_governor.services.job.trackers import TRACKERS\n"
        "for _ in range(2):\n"
        "    try: print('acme' in list(TRACKERS))\n"
        "    except ValueError as error: print(error)\n"
    )

    def run(body: str) -> list[str]:
        (tmp_path / "acme_parts.py").write_text(body)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert run(MINE.format(name="acme", title="Acme")) == ["True", "True"]
    broken = "extensions: acme_parts (entry point acme) does not load (ZeroDivisionError: division by zero); mend or remove it"
    assert run("1 / 0") == [broken, broken]
