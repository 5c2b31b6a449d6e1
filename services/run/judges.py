"""A verifier's processes, and who judges what: a response costs no more than itself, whatever the verifier does on it.

pairs (response, answer) --> queue --> process 1..n --one line each--> Verdict
                               ^            |
                               |            +-- silent for timeout_s, or dead: that response has no score, the process is replaced
                               +-- responses that it had not begun
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from opd_governor.actors.trajectory import Trajectory
from opd_governor.services.inputs.golden import GoldenSet
from opd_governor.services.inputs.refusals import words
from opd_governor.services.inputs.trial import PROCESS, START_S
from opd_governor.services.inputs.verdicts import MEMORY_VARIABLE, TIMEOUT_VARIABLE, Reason, Verdict, failed
from opd_governor.services.job.settings import VerifierProcesses

Judge = Callable[[Sequence[tuple[str, str]]], Awaitable[list[Verdict]]]
"""(response, answer) pairs -> their verdicts, in order."""
AT_ONCE = 8
"""Responses handed to a process together, so that it never waits for the driver."""

Asked = tuple[str, str, asyncio.Future[Verdict]]


async def judge_rollouts(judge: Judge, decode: Callable[[Sequence[int]], str], trajectories: Sequence[Trajectory]) -> list[Verdict]:
    """Verdicts on rollouts, each as text without its stop id."""
    return await judge([(decode(t.answer_ids), t.prompt.answer or "") for t in trajectories])


async def judge_teacher(
    judge: Judge, decode: Callable[[Sequence[int]], str], golden: GoldenSet, answer_to: Callable[[int], str | None]
) -> dict[int, bool]:
    """Prompt index -> whether the teacher's own answer is right. One that did not end is not; one without a verdict is left out."""
    ended = [index for index, finished in golden.finished.items() if finished and index in golden.answers]
    verdicts = await judge([(decode(golden.answers[index]), answer_to(index) or "") for index in ended])
    right = {index: verdict.passed for index, verdict in zip(ended, verdicts, strict=True) if verdict.score is not None}
    return {index: False for index, finished in golden.finished.items() if not finished} | right


class VerifierError(Exception):
    """A process is of no more use; `reason` is the verdict on the response that it was at."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class Judges:
    """The processes of one verifier. They start with the first responses, and end with `close`.

    >>> judges = Judges("number", VerifierProcesses()); await judges([("it is 4", "4")])   # doctest: +SKIP
    [Verdict(score=1.0, reason=None, trouble='')]
    """

    def __init__(self, spec: str, settings: VerifierProcesses) -> None:
        self._spec, self._settings = spec, settings
        self._asked: deque[Asked] = deque()
        self._news = asyncio.Event()
        self._serving: list[asyncio.Task[None]] = []

    async def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """A verdict on each (response, answer)."""
        loop = asyncio.get_running_loop()
        asked = [(response, answer, loop.create_future()) for response, answer in pairs]
        self._asked += asked
        self._news.set()
        while asked and len(self._serving) < self._settings.processes:
            self._serving.append(asyncio.create_task(self._serve()))
        return [await verdict for _, _, verdict in asked]

    async def close(self) -> None:
        """End the processes."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._serving.clear()

    async def _serve(self) -> None:
        """One process after another, each until it fails."""
        while True:
            taken: deque[Asked] = deque()
            try:
                async with _started(self._spec, self._settings) as process:
                    while True:
                        await self._take(taken)
                        await self._judge(process, taken)
            except VerifierError as error:
                await self._take(taken)
                _response, answer, verdict = taken.popleft()
                if not verdict.done():
                    verdict.set_result(failed(error.reason, answer, str(error)))
                self._asked.extendleft(reversed(taken))
                self._news.set()

    async def _take(self, taken: deque[Asked]) -> None:
        """The next responses; those that nobody waits for any more are dropped."""
        while not taken:
            while self._asked and len(taken) < AT_ONCE:
                asked = self._asked.popleft()
                if not asked[2].done():
                    taken.append(asked)
            if not taken:
                self._news.clear()
                await self._news.wait()

    async def _judge(self, process: asyncio.subprocess.Process, taken: deque[Asked]) -> None:
        assert process.stdin is not None
        lines = [json.dumps({"response": response, "answer": answer}) + "\n" for response, answer, _ in taken]
        process.stdin.write("".join(lines).encode())
        while taken:
            said = await _line(process, self._settings.timeout_s)
            _, _, verdict = taken.popleft()
            if not verdict.done():
                verdict.set_result(Verdict(**said))


class JudgesOf:
    """Judges by verifier: a reward and an evaluation with the same one share its processes, which end with `to_the_end`."""

    def __init__(self, settings: VerifierProcesses, to_the_end: contextlib.AsyncExitStack) -> None:
        self._settings, self._to_the_end = settings, to_the_end
        self._judges: dict[str, Judges] = {}

    def __call__(self, spec: str) -> Judges:
        if spec not in self._judges:
            self._judges[spec] = Judges(spec, self._settings)
            self._to_the_end.push_async_callback(self._judges[spec].close)
        return self._judges[spec]


@contextlib.asynccontextmanager
async def _started(spec: str, settings: VerifierProcesses) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has loaded the verifier. Raises VerifierError where it does not."""
    limits = {TIMEOUT_VARIABLE: str(settings.timeout_s), MEMORY_VARIABLE: str(settings.memory_mib)}
    command = (sys.executable, "-m", PROCESS, spec)
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=os.environ | limits, start_new_session=True)
    except OSError as error:
        raise VerifierError("died", f"its process does not start: {words(error)}") from None
    try:
        said = await _line(process, START_S)
        if "ready" not in said:
            raise VerifierError("died", f"it does not load: {said.get('trouble')}")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _line(process: asyncio.subprocess.Process, timeout_s: float) -> dict[str, Any]:
    """What the process says next. Raises VerifierError where it is silent for so long, or dead."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
    except TimeoutError:
        raise VerifierError("timeout", f"no verdict within {timeout_s:g} s (data.verifiers.timeout_s)") from None
    if not line:
        code = await process.wait()
        raise VerifierError("died", f"its process ended with {'signal ' if code < 0 else 'exit code '}{abs(code)}")
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError):
        raise VerifierError("nonsense", f"its process says {line[:60]!r}, which is no verdict") from None
