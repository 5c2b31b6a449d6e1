"""A job names a file, and its parts are added to their kinds: in this process, and through the environment in others."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from opd_governor.actors import extensions
from opd_governor.actors.extensions import ExtensionError, Kind, use_extensions

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
    ],
)
def test_what_does_not_load_is_one_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ExtensionError, match=says) as caught:
        use_extensions([str(tmp_path / name)])
    assert "\n" not in str(caught.value)
