"""When teachers that follow are told of new weights, and how a process that was restarted comes by them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.teacher.actor import RayTeacher, TeacherActor
from opd_governor.services.job.settings import Job
from opd_governor.services.run.following import Following


class Learner:
    num_restores, version = 0, 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def followed_version(self) -> int:
        return self.version

    async def followed(self, dtype: str) -> tuple[int, str]:
        self.asked.append(dtype)
        return self.version, f"weights {len(self.asked)}"


def job(*follows: dict[str, Any] | None, dtype: str = "float32") -> Job:
    teachers = [{"model": "m", "name": f"t{index}", "follow": follow, "dtype": dtype} for index, follow in enumerate(follows)]
    return Job.model_validate({"name": "a", "student": {"model": "m"}, "teacher": teachers, "data": {"prompts": {"path": "p"}}})


async def test_those_that_follow_are_told_once_a_change_and_again_after_a_restore() -> None:
    told: dict[str, list[tuple[str, Any]]] = {"t0": [], "t1": []}
    versions: list[int] = []
    given = job({"ema": 0.9}, None, dtype="bfloat16")

    def handle(name: str) -> Any:
        return SimpleNamespace(handle=SimpleNamespace(follow=lambda *what: told[name].append(what)))

    pool: Any = SimpleNamespace(teachers=[SimpleNamespace(settings=t, members=(handle(t.name), handle(t.name))) for t in given.teacher])
    learner, journal = Learner(), SimpleNamespace(followed=versions.append)
    following = Following(given, learner, pool, journal)  # type: ignore[arg-type]
    await following.bring()
    await following.bring()
    learner.version = 5
    await following.bring()
    learner.num_restores, learner.version = 1, 5  # a rollback leaves the version and changes the weights
    await following.bring()
    names = ["0/0", "0/5", "1/5"]
    assert told["t0"] == [(name, f"weights {index}") for index, name in enumerate(names, 1) for _ in range(2)]
    assert told["t1"] == []
    assert versions == [0, 5, 5]
    assert learner.asked == ["bfloat16"] * 3


async def test_nothing_is_asked_where_no_teacher_follows() -> None:
    await Following(job(None), None, None, None).bring()  # type: ignore[arg-type]


async def test_each_call_names_the_weights_and_a_new_process_fetches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    class Scorer:
        def __init__(self) -> None:
            self.weights = b"as it came"

        def follow(self, weights: bytes) -> None:
            self.weights = weights

        def score(self, requests: Any) -> list[None]:
            return [None] * len(requests)

    def fetch(reference: str) -> np.ndarray:
        fetched.append(reference)
        return np.frombuffer(reference.encode(), np.uint8)

    monkeypatch.setattr("opd_governor.actors.teacher.actor.ray.get", fetch)
    monkeypatch.setattr(TeacherActor, "ping", lambda self: "here")

    def process() -> TeacherActor:
        actor = object.__new__(TeacherActor)
        actor.scorer, actor._followed = Scorer(), ""  # type: ignore[assignment]
        return actor

    async def remote(*arguments: Any) -> bytes:
        return served.score_packed(*arguments)

    served = process()
    teacher = RayTeacher(SimpleNamespace(score_packed=SimpleNamespace(remote=remote)))
    await teacher.score([])
    assert served.scorer.weights == b"as it came"  # type: ignore[attr-defined]
    teacher.follow("0/3", "third")
    await teacher.score([])
    await teacher.score([])
    assert fetched == ["third"]
    served = process()  # Ray restarted it
    await teacher.score([])
    assert served.scorer.weights == b"third"  # type: ignore[attr-defined]
