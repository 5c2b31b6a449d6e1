"""The Ray shell around an engine: prompts in, finished trajectories out as they finish; weights in.

learner --weights--> RolloutActor(Engine) --chunks of Trajectory--> driver
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from opd_governor.actors.rollout.refusals import unanswered
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.actors.wire import pack, rows_of, tabulate, unpack

if TYPE_CHECKING:
    from opd_governor.actors.rollout.engine import Completion

Rollout = Callable[..., AsyncGenerator[list[Trajectory], None]]
"""(requests, limits, step, settings, greedy=) -> finished trajectories."""
LEAST_HAND_ON_S = 0.05
MESSAGES_PER_S = 250
"""What all rollout actors together may send one driver. A message and the scoring it leads to cost it some .4 ms: a tenth of its time."""


def hand_on_s(num_actors: int) -> float:
    """How long an actor gathers finished rollouts before it hands them on; its last ones go at once."""
    return max(LEAST_HAND_ON_S, num_actors / MESSAGES_PER_S)


class RolloutActor:
    """Samples the student with one vLLM engine. An async actor: many calls are in flight at once.

    `top_k` > 0 records the student's top-k ids at each position, for a dense loss on the student's support. `strict` starts
    the requests of a call together, one call at a time: the engine's arithmetic depends, in the last bits, on which requests
    share a pass, and so the same call gives the same bits in any process.
    """

    def __init__(
        self,
        model: str,
        settings: RolloutSettings,
        *,
        stop_ids: tuple[int, ...],
        reference_tokens: float | None,
        weight_transfer: str,
        seed: int,
        top_k: int = 0,
        strict: bool = False,
    ) -> None:
        self._strict, self._turn = strict, asyncio.Lock()
        self._deliveries = Deliveries()
        self._model, self._settings, self._seed = model, settings, seed
        self._stop_ids, self._reference_tokens, self._top_k = stop_ids, reference_tokens, top_k
        self._weight_transfer = weight_transfer
        self._folder: str | None = None
        """Of a LoRA student: its adapters', one folder a version."""
        self._base: np.ndarray | None = None
        """Its base's log-probs of the probe."""
        self._numbers = itertools.count()

    async def start(self) -> int:
        """Bring the engine up; returns its context window, tokens."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(self._settings.kv_cache_gib))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # On CPUs: the model in the engine's own process. As a worker of its own the two spin while they wait for each other,
        # which takes a core from teacher and learner, and one more process has to import torch.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from opd_governor.actors.rollout.engine import Engine  # importing vllm takes seconds: not before the actor has its own process

        self._engine = Engine(self._model, self._settings, weight_transfer=self._weight_transfer, seed=self._seed, max_logprobs=self._top_k)
        return self._engine.context_tokens

    def set_reference(self, reference_tokens: float) -> None:
        """Length that a stop ramp without a target of its own starts from."""
        self._reference_tokens = reference_tokens

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncGenerator[list[Trajectory], None]:
        """Sample one response per (prompt, sample number) under `limits`; yields lists of trajectories as they finish.

        `settings` are the sampling settings in force: they may change while the run goes on.
        """
        pending: set[asyncio.Task[Trajectory]] = set()
        async with self._turn if self._strict else contextlib.nullcontext():
            try:
                async with self._held() if self._strict else contextlib.nullcontext():
                    for prompt, sample in requests:
                        pending.add(asyncio.create_task(await self._submit(prompt, sample, limits, step, settings, greedy)))
                own_top = self._top_k > 0 and settings.filtered and not greedy
                waiting: list[Trajectory] = []
                while pending:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    if pending:
                        more, pending = await asyncio.wait(pending, timeout=hand_on_s(self._settings.num_actors))
                        done |= more
                    finished = [task.result() for task in done]
                    if own_top and self._strict:
                        waiting += finished  # their second pass must not share one with sampling
                    else:
                        yield list(await asyncio.gather(*map(self._with_top, finished))) if own_top else finished
                if waiting:
                    waiting.sort(key=lambda trajectory: (trajectory.prompt.epoch, trajectory.prompt.index, trajectory.sample))
                    yield [await self._with_top(trajectory) for trajectory in waiting]
            finally:
                for task in pending:
                    task.cancel()

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        """What is submitted meanwhile begins together at the end. The engine goes on even if a submit fails."""
        await self._engine.hold()
        try:
            yield
        finally:
            await self._engine.release()

    async def _with_top(self, trajectory: Trajectory) -> Trajectory:
        """With the student's own top-k ids. Sampling through filters, the engine lists ids that are filtered out as if they were likely."""
        ids_TK = await self._engine.top_ids(trajectory.prompt.token_ids, trajectory.token_ids, self._top_k)
        return replace(trajectory, support_ids_TK=ids_TK)

    async def _submit(
        self, prompt: Prompt, sample: int, limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool
    ) -> Coroutine[None, None, Trajectory]:
        """Put one request into the engine's queue; the coroutine returned waits for its trajectory."""
        from opd_governor.actors.rollout.sampling import greedy_params, sampling_params

        terms: dict[str, Any] = {"stop_ids": self._stop_ids, "context_tokens": self._engine.context_tokens}
        if greedy:
            params = greedy_params(prompt, limits, settings, **terms)
        else:
            seed = request_seed(self._seed, prompt, sample, step)
            top_k = 0 if settings.filtered else self._top_k
            params = sampling_params(
                prompt, limits, settings, seed=seed, reference_tokens=self._reference_tokens, top_k_logprobs=top_k, **terms
            )
        try:
            answer = await self._engine.submit(list(prompt.token_ids), params)
        except ValueError as error:  # the engine's word on this request alone: the others are served
            refusal = str(error)

            async def refused() -> Trajectory:
                return unanswered(prompt, sample, limits, step, refusal)

            return refused()

        async def trajectory() -> Trajectory:
            return self._trajectory(await answer, prompt, sample, limits, step, settings)

        return trajectory()

    def _trajectory(
        self, completion: "Completion", prompt: Prompt, sample: int, limits: LengthLimits, step: int, settings: RolloutSettings
    ) -> Trajectory:
        from opd_governor.actors.rollout.loops import find_loop
        from opd_governor.actors.rollout.sampling import budget_tokens
        from opd_governor.actors.rollout.thinking import parts_of

        token_ids = completion.token_ids
        spoken = token_ids[:-1] if token_ids and token_ids[-1] in self._stop_ids else token_ids
        loop = find_loop(spoken, min_repeats=settings.loop_min_repeats, min_tokens=settings.loop_min_tokens)
        parts = parts_of(settings.thinking_ids, settings.thinking_budget_tokens, prompt.token_ids, token_ids)
        return Trajectory(
            prompt=prompt,
            token_ids=token_ids,
            logprobs_T=completion.logprobs_T,
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            budget_tokens=budget_tokens(prompt, limits, self._engine.context_tokens),
            step=step,
            weight_version=completion.weight_version,
            limits_generation=limits.generation,
            sample=sample,
            loop_onset=loop.onset if loop else None,
            loop_period=loop.period if loop else None,
            support_ids_TK=completion.top_ids_TK,
            num_thinking=parts.num_thinking,
            forced=parts.forced,
        )

    async def rollout_packed(self, ticket: int, message: bytes | None) -> bytes | None:
        """`rollout` as the driver calls it (see `Deliveries.fetch`)."""
        return await self._deliveries.fetch(self.rollout, ticket, message)

    async def drop(self, ticket: int) -> None:
        """Nobody waits for these any more: the engine stops sampling them."""
        self._deliveries.drop(ticket)

    async def probe(self, token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of a fixed sequence, to hold against the learner's."""
        return await self._engine.probe(list(token_ids))

    # The verbs of vLLM's RayVLLMWeightSyncClient: the learner's trainer engine (nccl, ipc) calls them on every rollout actor.

    async def announce_version(self, weight_version: int) -> None:
        """The version that the update about to come will bring. Raises where the engine is dead."""
        await self._engine.check()
        self._incoming_version = weight_version

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._engine.init_weight_transfer(request.init_info)

    async def start_weight_update(self) -> None:
        await self._engine.start_update()

    async def update_weights(self, request: Any) -> None:
        await self._engine.update_weights(request.update_info)

    async def finish_weight_update(self) -> None:
        await self._engine.finish_update(self._incoming_version)

    async def load_weights(self, weights: np.ndarray, weight_version: int, probe: Sequence[int]) -> np.ndarray:
        """A whole update from the bytes of a safetensors file (uint8), which the object store brought to this node; then the probe:
        log-probs [L - 1], or [2, L - 1] of a LoRA student, the second of its base."""
        if self._settings.engine.get("enable_lora"):
            return await self._load_adapter(weights, weight_version, probe)
        # Memory without a name, opened by the engine's process through /proc: it goes with this process, however that ends. A file
        # in /dev/shm would stay behind a killed actor and take a student's worth of memory each time.
        with os.fdopen(os.memfd_create("opd-weights"), "wb") as file:
            file.write(weights.data)
            file.flush()
            await self._engine.load_file(f"/proc/{os.getpid()}/fd/{file.fileno()}", weight_version)
        return await self.probe(probe)

    async def _load_adapter(self, weights: np.ndarray, weight_version: int, probe: Sequence[int]) -> np.ndarray:
        """A LoRA student's addition, from a safetensors file with its configuration in the header. vLLM reads it from a folder."""
        if self._base is None:
            # Once, before the first addition: on CPUs vLLM gives a request without one that shares a pass with others another's.
            self._base = await self._engine.probe(list(probe), base=True)
        self._folder = self._folder or tempfile.mkdtemp(prefix="opd-adapters-")
        folder = Path(self._folder, str(next(self._numbers)))
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(weights.data)
        length = int.from_bytes(weights[:8].tobytes(), "little")
        header = json.loads(weights[8 : 8 + length].tobytes())
        (folder / "adapter_config.json").write_text(header["__metadata__"]["adapter_config"])
        for gone in await self._engine.load_adapter(str(folder), weight_version):
            shutil.rmtree(gone, ignore_errors=True)
        return np.stack([await self.probe(probe), self._base])

    async def shutdown(self) -> None:
        """End the engine's processes; the actor itself is ended by Ray."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Delivery:
    """One `rollout` under way, and what of it has finished and was not fetched."""

    def __init__(self, rollout: Rollout, message: bytes) -> None:
        prompt_table, samples, limits, step, settings, greedy = unpack(message)
        prompts = rows_of(prompt_table)
        self._places = {(prompt.epoch, prompt.index): place for place, prompt in enumerate(prompts)}
        self.num_open = len(prompts)
        self._finished: list[Trajectory] = []
        self._news = asyncio.Event()
        requests = list(zip(prompts, samples, strict=True))
        self.task = asyncio.create_task(self._run(rollout(requests, limits, step, settings, greedy=greedy)))

    async def _run(self, answers: AsyncGenerator[list[Trajectory], None]) -> None:
        try:
            async with contextlib.aclosing(answers) as groups:
                async for group in groups:
                    self._finished += group
                    self._news.set()
        finally:
            self._news.set()

    async def next(self) -> bytes | None:
        """All that has finished, as soon as there is something. A prompt goes as its place among those asked for: the driver has it."""
        while not self._finished and not self.task.done():
            self._news.clear()
            await self._news.wait()
        if not self._finished:
            await self.task  # raises what ended it
            return None
        group, self._finished = self._finished, []
        self.num_open -= len(group)
        return pack(tabulate(group, prompt=[self._places[t.prompt.epoch, t.prompt.index] for t in group]))


class Deliveries:
    """Rollouts under way, by the driver's ticket.

    The driver fetches finished ones with calls that wait. A stream of Ray's costs it half as much again for each of its few messages,
    for it has an end to tell besides, and what has piled up here goes at once.
    """

    def __init__(self) -> None:
        self._open: dict[int, Delivery] = {}

    async def fetch(self, rollout: Rollout, ticket: int, message: bytes | None) -> bytes | None:
        """The next finished ones, packed; None where no more come. The first call of a ticket brings the packed arguments."""
        if message is not None:
            self._open[ticket] = Delivery(rollout, message)
        delivery = self._open[ticket]
        group = None
        try:
            group = await delivery.next()
            return group
        finally:
            if group is None or not delivery.num_open:
                self._open.pop(ticket, None)

    def drop(self, ticket: int) -> None:
        if (delivery := self._open.pop(ticket, None)) is not None:
            delivery.task.cancel()


class RayEngine:
    """A rollout actor as the pool sees it: coroutines instead of object references."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._tickets = itertools.count()

    async def start(self) -> None:
        await self.actor.start.remote()

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool
    ) -> AsyncIterator[list[Trajectory]]:
        prompts, samples = zip(*requests, strict=True)
        ticket, num_open = next(self._tickets), len(requests)
        message: bytes | None = pack((tabulate(prompts), samples, limits, step, settings, greedy))
        try:
            while num_open and (packed := await self.actor.rollout_packed.remote(ticket, message)) is not None:
                message = None
                table = unpack(packed)
                table.columns["prompt"] = [prompts[place] for place in table.columns["prompt"]]
                group = rows_of(table)
                num_open -= len(group)
                yield group
        except BaseException:  # also a cancellation: nobody waits any more, the engine must not sample on
            self.actor.drop.remote(ticket)
            raise

    async def end(self) -> None:
        """By force; the engine's own processes end with the actor's."""
        await asyncio.to_thread(ray.kill, self.actor)


def request_seed(seed: int, prompt: Prompt, sample: int, step: int) -> int:
    """A seed of its own for every request, the same in every run of the same job."""
    of_turn = (prompt.turn,) if prompt.turn else ()
    state = np.random.SeedSequence((seed, prompt.epoch, prompt.index, sample, step, *of_turn)).generate_state(1)
    return int(state[0] & 0x7FFFFFFF)
