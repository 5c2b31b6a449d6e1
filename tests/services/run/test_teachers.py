"""Teachers that share actors: only if every setting of the actor is the same."""

from pathlib import Path
from typing import Any

import pytest

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.run.teachers import _served_as
from tests.tiny import build_tiny


@pytest.mark.parametrize(
    ("own", "shared"),
    [
        ({}, True),
        ({"name": "maths", "domains": ("maths",), "weight": 2.0, "beams": 4}, True),
        ({"num_actors": 3}, False),
        ({"batch_tokens": 64}, False),
        ({"chunk_tokens": 64}, False),
        ({"dtype": "bfloat16"}, False),
        ({"backend": "vllm"}, False),
        ({"gpu_memory_utilization": 0.3}, False),
        ({"timeout_s": 5.0}, False),
    ],
)
def test_two_teachers_with_the_same_weights_share_actors_only_where_these_would_be_the_same(
    tmp_path: Path, own: dict[str, Any], shared: bool
) -> None:
    model = str(build_tiny(tmp_path / "model"))
    assert (_served_as(TeacherSettings(model=model)) == _served_as(TeacherSettings(model=model, **own))) is shared


def test_a_servers_teachers_are_told_apart_by_address_and_name() -> None:
    def at(url: str, model: str) -> str:
        return _served_as(TeacherSettings(model=model, backend="http", url=url))

    assert at("http://a:1", "m") == at("http://a:1", "m") != at("http://b:1", "m")
    assert at("http://a:1", "m") != at("http://a:1", "n")
