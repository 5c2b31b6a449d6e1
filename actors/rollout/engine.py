"""One vLLM engine that samples the student: generate, receive weights, score a probe.

Weight updates keep requests in flight: their later tokens come from the newer weights over the keys and values that the older ones
left, as in PipelineRL (arXiv 2509.19128): computing these again would be a pass over every prompt and response under way.
Each token's log-prob is that of the distribution it was drawn from. The version at a request's first token is on its trajectory.
"""

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import PauseMode
from vllm.v1.engine.async_llm import AsyncLLM

from opd_governor.actors.rollout.arguments import engine_arguments
from opd_governor.actors.rollout.logits import LOGITS_PROCESSORS
from opd_governor.actors.rollout.settings import RolloutSettings

BACKENDS = {"ipc": "opd_ipc", "nccl": "opd_nccl", "gloo": "opd_gloo"}
"""The job's name of a transfer -> vLLM's, where the two differ (see ipc.py, broadcast.py)."""
OWNER = "OPD_ENGINE_OWNER"
"""Environment variable: process id of the engine's parent (see worker.py)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request: ids, processed log-probs [T] and top-k ids [T, K] as asked, why it ended."""

    token_ids: tuple[int, ...]
    logprobs_T: np.ndarray
    finish_reason: str
    weight_version: int
    top_ids_TK: np.ndarray | None


class Engine:
    """AsyncLLM with the student's architecture; it starts with dummy weights and waits for the learner's.

    >>> engine = Engine("deploy/sums/student", RolloutSettings(), weight_transfer="file")   # doctest: +SKIP
    >>> await engine.load_file("student/model.safetensors", 0); completion = await engine.generate([5, 9], params)
    """

    def __init__(self, model: str, settings: RolloutSettings, *, weight_transfer: str, seed: int = 0, max_logprobs: int = 20) -> None:
        cpu = current_platform.is_cpu()
        arguments = engine_arguments(model, settings, seed=seed, max_logprobs=max_logprobs, cpu=cpu)
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=BACKENDS.get(weight_transfer, weight_transfer))
        if settings.stop_ramp.strength_nats > 0 or settings.no_repeat_ngram > 0 or settings.thinking_budget_tokens is not None:
            # Only where asked for: vLLM's newer model runner, the default on GPUs, does not load processors of this interface.
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
            arguments["logits_processors"] = list(LOGITS_PROCESSORS)
        os.environ[OWNER] = str(os.getpid())
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._request_ids = itertools.count()
        self.weight_version = -1
        self._adapters: deque[LoRARequest] = deque()
        """Of a LoRA student: the one in force last, before it those that requests in flight may still use."""
        self._num_kept: int = arguments.get("max_loras", 0)
        self._num_updates = 0
        """Unlike the version, never reused: a learner that went back to a checkpoint takes its steps again, to other weights."""
        self.context_tokens: int = self._llm.model_config.max_model_len

    async def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> Completion:
        """Sample one response. Cancelling the task aborts the request in the engine."""
        return await (await self.submit(prompt_token_ids, params))

    async def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> Coroutine[None, None, Completion]:
        """Put a request into the engine's queue; the coroutine returned waits for its response."""
        weight_version = self.weight_version
        answer = await self._add(prompt_token_ids, params)

        async def completion() -> Completion:
            return _completion((await answer).outputs[0], weight_version)

        return completion()

    async def hold(self) -> None:
        """Drop everything under way, cached prefixes too; requests submitted from here on wait for `release`."""
        await self._pause("abort")

    async def _pause(self, mode: PauseMode) -> None:
        """As `AsyncLLM.pause_generation`, without the 20 ms that it sleeps afterwards for outputs under way: they are waited for here
        by those whom they concern."""
        await self._llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=mode == "abort")

    async def release(self) -> None:
        """All requests submitted since `hold` begin in the same pass, in the order in which they came."""
        await self._llm.resume_generation()

    async def probe(self, token_ids: list[int], *, base: bool = False) -> np.ndarray:
        """Log-probs [L - 1] of a fixed sequence under the weights in force, nats, float32; `base`: without a LoRA student's addition."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await (await self._add(token_ids, params, base=base))
        assert output.prompt_logprobs is not None
        return np.array([row[token].logprob for row, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)], np.float32)

    async def top_ids(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], num: int) -> np.ndarray:
        """[T, num] the likeliest ids at each position of a response, whatever filters it was sampled through: temperature 1, the weights
        in force. One pass over prompt and response, without decoding."""
        if not token_ids:
            return np.empty((0, num), np.int32)
        params = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=num, logprobs=num, seed=0, detokenize=False, flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        # The last token is left out: it may be the window's last. What follows the one before it is asked as the next token.
        output = await (await self._add([*prompt_token_ids, *token_ids[:-1]], params))
        within, last = output.prompt_logprobs, output.outputs[0].logprobs
        assert isinstance(within, FlatLogprobs)
        assert isinstance(last, FlatLogprobs)
        # Each row: the token itself, then the likeliest, which may name it again.
        first = within.start_indices[len(prompt_token_ids)] if len(token_ids) > 1 else len(within.token_ids)
        ids = [*within.token_ids[first:], *last.token_ids]
        return np.array(ids, np.int32).reshape(len(token_ids), num + 1)[:, 1:]

    async def _add(
        self, prompt_token_ids: list[int], params: SamplingParams, *, base: bool = False
    ) -> Coroutine[None, None, RequestOutput]:
        request_id = str(next(self._request_ids))
        # The salt keeps a request from a prefix that other weights have left in the cache.
        prompt = {"prompt_token_ids": prompt_token_ids, "cache_salt": str(self._num_updates)}
        adapter = self._adapters[-1] if self._adapters and not base else None
        collector = await self._llm.add_request(request_id, prompt, params, lora_request=adapter)

        async def last_output() -> RequestOutput:
            try:
                while True:
                    output = await collector.get()
                    if output.finished:
                        return output
            except asyncio.CancelledError:
                await self._llm.abort(request_id)
                raise
            finally:
                collector.close()

        return last_output()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer (a no-op for the file back end); an update that another one left unfinished is forgotten."""
        await self._llm.collective_rpc("abandon_update")
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def load_file(self, path: str, weight_version: int) -> None:
        """A whole update out of a safetensors file ("file" back end)."""
        await self._pause("keep")
        await self._llm.collective_rpc("load_file", args=(path,))
        self._updated(weight_version)
        await self._llm.resume_generation()

    async def check(self) -> None:
        """Raises where the engine's own processes are dead."""
        await self._llm.check_health()

    async def load_adapter(self, folder: str, weight_version: int) -> list[str]:
        """Requests from here on use this adapter; those in flight keep theirs. Returns the folders that no request can use any more.

        Every adapter has a name, an id and a folder of its own: vLLM's prefix cache goes by them, and would serve an older one's.
        Raises ValueError for a folder that is in use.
        """
        if any(folder == held.lora_path for held in self._adapters):
            raise ValueError(f"{folder} is an older version's: vLLM serves what it held before; give each version a folder of its own")
        number = self._num_updates + 1
        request = LoRARequest(f"policy-{number}", number, folder)
        await self._llm.add_lora(request)
        self._adapters.append(request)
        self._updated(weight_version)
        gone = []
        while len(self._adapters) > self._num_kept:
            old = self._adapters.popleft()
            await self._llm.remove_lora(old.lora_int_id)
            gone.append(old.lora_path)
        return gone

    async def start_update(self) -> None:
        """Freeze the requests in flight and make the model ready to load."""
        await self._pause("keep")
        await self._llm.start_weight_update()

    async def update_weights(self, update_info: Any) -> None:
        """Load one chunk of weights."""
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_update(self, weight_version: int) -> None:
        """Put the new weights into force and let the requests go on."""
        await self._llm.finish_weight_update()
        self._updated(weight_version)
        await self._llm.resume_generation()

    def _updated(self, weight_version: int) -> None:
        self.weight_version = weight_version
        self._num_updates += 1

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()
        # vLLM closes the sockets of this context and forgets the context. Its end waits for a socket that is open after all: beside us.
        threading.Thread(target=self._llm.engine_core.resources.ctx.term, daemon=True).start()


def _completion(output: CompletionOutput, weight_version: int) -> Completion:
    """From vLLM's flat log-probs: for each position the sampled token's, then those of the K likeliest, which may name it again."""
    token_ids, flat = tuple(output.token_ids), output.logprobs
    assert isinstance(flat, FlatLogprobs)
    assert len(flat) == len(token_ids)
    ids_TN = np.array(flat.token_ids, np.int32).reshape(len(token_ids), max(1, len(flat.token_ids) // max(1, len(token_ids))))
    logprobs_T = np.array(flat.logprobs, np.float32).reshape(ids_TN.shape)[:, 0]
    top_ids_TK = None
    if ids_TN.shape[1] > 1:
        again_TN = ids_TN == ids_TN[:, :1]
        again_TN[:, 0] = False
        top_ids_TK = np.take_along_axis(np.where(again_TN, -1, ids_TN), np.argsort(again_TN, axis=1, kind="stable"), axis=1)
        if again_TN.any(axis=1).all():
            top_ids_TK = top_ids_TK[:, :-1]
    return Completion(token_ids, logprobs_T, output.finish_reason or "error", weight_version, top_ids_TK)
