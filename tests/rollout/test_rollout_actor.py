"""What a rollout actor does around its engine, with an engine that needs no vLLM."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.rollout.actor import Deliveries, RayEngine, RolloutActor
from opd_governor.actors.rollout.refusals import Refusals
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory

SHARED = Path("/dev/shm")


class ReadingEngine:
    """Reads the weights as an engine does: in another process, by their path."""

    def __init__(self) -> None:
        self.read, self.path, self.files_meanwhile = b"", "", set[Path]()
        self.version = -1

    async def load_file(self, path: str, weight_version: int) -> None:
        self.path, self.version = path, weight_version
        self.files_meanwhile = set(SHARED.iterdir())
        reader = "import pathlib, sys; sys.stdout.buffer.write(pathlib.Path(sys.argv[1]).read_bytes())"
        self.read = subprocess.run([sys.executable, "-c", reader, self.path], capture_output=True, check=True).stdout

    async def probe(self, token_ids: list[int]) -> np.ndarray:
        return np.array(token_ids, np.float32)


async def test_weights_on_their_way_to_the_engine_leave_no_file_behind_an_actor_that_is_killed() -> None:
    terms: dict[str, Any] = {"stop_ids": (1,), "reference_tokens": None, "weight_transfer": "file", "seed": 0}
    actor, engine = RolloutActor("none", RolloutSettings(), **terms), ReadingEngine()
    actor._engine = engine  # type: ignore[assignment]
    weights = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    before = set(SHARED.iterdir())
    probed = await actor.load_weights(weights, 3, [5, 9])
    assert probed.tolist() == [5, 9]
    assert (engine.read, engine.version) == (weights.tobytes(), 3)
    assert not {path for path in engine.files_meanwhile - before if path.name.startswith("opd")}
    assert not Path(engine.path).exists(), "the memory is given back when the engine has it"


LIMITS = LengthLimits(cap_tokens=8)


class TwoGroups(RolloutActor):
    """Answers its first request at once, the others when told; `error` ends it after the first."""

    def __init__(self, error: Exception | None = None) -> None:
        self._deliveries, self.go, self.error, self.dropped = Deliveries(), asyncio.Event(), error, False

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any, *, greedy: bool = False
    ) -> AsyncGenerator[list[Trajectory], None]:
        def answer(prompt: Prompt, sample: int) -> Trajectory:
            return Trajectory(prompt, (7, prompt.index), np.array([-1, sample], np.float32), "stop", limits.cap_tokens, step, 3, 0, sample)

        try:
            yield [answer(*requests[0])]
            if self.error is not None:
                raise self.error
            await self.go.wait()
            for request in requests[1:]:
                yield [answer(*request)]
        except asyncio.CancelledError:
            self.dropped = True
            raise


class Handle:
    """The actor, called as Ray's handles are."""

    def __init__(self, actor: RolloutActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *terms: asyncio.ensure_future(getattr(self._actor, name)(*terms)))


def ask(actor: RolloutActor) -> AsyncGenerator[list[Trajectory], None]:
    prompts = [Prompt(index, (5,) * (index + 1), text=f"prompt {index}") for index in (4, 2)]
    requests = [(prompt, sample) for prompt in prompts for sample in range(2)]
    return RayEngine(Handle(actor)).rollout(requests, LIMITS, 6, RolloutSettings(), False)  # type: ignore[return-value]


async def test_the_driver_gets_every_trajectory_as_the_engine_made_it_and_what_piled_up_at_once() -> None:
    actor, groups = TwoGroups(), []
    async for group in ask(actor):
        groups.append(group)
        actor.go.set()
    assert [[(t.prompt.index, t.sample) for t in group] for group in groups] == [[(4, 0)], [(4, 1), (2, 0), (2, 1)]]
    last = groups[1][-1]
    assert last.prompt == Prompt(2, (5, 5, 5), text="prompt 2")
    assert (last.token_ids, last.logprobs_T.tolist(), last.finish_reason, last.step) == ((7, 2), [-1.0, 1.0], "stop", 6)
    assert not actor._deliveries._open


async def test_what_ends_the_engine_is_raised_after_what_it_had_finished() -> None:
    actor = TwoGroups(ValueError("context window"))
    groups = ask(actor)
    assert len(await anext(groups)) == 1
    with pytest.raises(ValueError, match="context window"):
        await anext(groups)
    assert not actor._deliveries._open


async def test_an_engine_stops_sampling_when_nobody_waits_any_more() -> None:
    actor = TwoGroups()
    async with contextlib.aclosing(ask(actor)) as groups:
        assert len(await anext(groups)) == 1
    await asyncio.sleep(0.01)
    assert actor.dropped
    assert not actor._deliveries._open


class PickyEngine:
    """Takes prompts of up to three tokens, as an engine with that window does."""

    context_tokens, weight_version = 3, 5

    async def submit(self, prompt_token_ids: list[int], params: Any) -> Any:
        if len(prompt_token_ids) > 3:
            raise ValueError("the prompt is longer than the window of 3")

        async def completion() -> Any:
            return SimpleNamespace(
                token_ids=(1,), logprobs_T=np.zeros(1, np.float32), finish_reason="stop", weight_version=5, top_ids_TK=None
            )

        return completion()


async def test_a_request_that_the_engine_refuses_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_governor.actors.rollout.sampling.greedy_params", lambda *terms, **named: None)
    actor = RolloutActor("none", RolloutSettings(), stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0)
    actor._engine = PickyEngine()  # type: ignore[assignment]
    requests = [(Prompt(index, (5,) * num), 0) for index, num in enumerate((2, 9, 3, 8))]
    answers = [t async for group in actor.rollout(requests, LIMITS, 1, RolloutSettings(), greedy=True) for t in group]
    assert {t.prompt.index: t.finish_reason for t in answers} == {0: "stop", 1: "error", 2: "stop", 3: "error"}
    told: list[str] = []
    Refusals(told.append).tell(sorted(answers, key=lambda t: t.prompt.index), step=1)
    assert told == ["step 1: the engine refuses prompt 1, counted as an error: the prompt is longer than the window of 3"]


class DyingEngine(PickyEngine):
    """Held for a call whose submit fails."""

    held = False

    async def hold(self) -> None:
        self.held = True

    async def release(self) -> None:
        self.held = False

    async def submit(self, prompt_token_ids: list[int], params: Any) -> Any:
        raise RuntimeError("engine dead")


async def test_an_engine_goes_on_after_a_submit_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_governor.actors.rollout.sampling.greedy_params", lambda *terms, **named: None)
    terms: dict[str, Any] = {"stop_ids": (1,), "reference_tokens": None, "weight_transfer": "file", "seed": 0, "strict": True}
    actor, engine = RolloutActor("none", RolloutSettings(), **terms), DyingEngine()
    actor._engine = engine  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="engine dead"):
        _ = [group async for group in actor.rollout([(Prompt(0, (5,)), 0)], LIMITS, 6, RolloutSettings(), greedy=True)]
    assert not engine.held
