"""A real engine obeys caps, stops and shaping, and the log-probs it records are those of the policy that sampled."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch

from opd_governor.actors.rollout.logits import LOGITS_PROCESSORS
from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.rollout.sampling import greedy_params, sampling_params
from opd_governor.actors.rollout.settings import LoopStop, RolloutSettings, StopRamp
from opd_governor.actors.trajectory import LengthLimits, Prompt
from tests.tiny import build_tiny

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning")]

CONTEXT_TOKENS = 256
STOP_IDS = (2, 3)
MODEL_EOS = 1
"""The model's own eos is left out of the stop event on purpose."""


class Student:
    """A tiny Llama in vLLM and in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from vllm import LLM

        build_tiny(folder, "llama", seed=3, eos=MODEL_EOS, context_tokens=CONTEXT_TOKENS)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.engine = LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=CONTEXT_TOKENS,
            max_num_seqs=32,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            logits_processors=list(LOGITS_PROCESSORS),
            disable_log_stats=True,
        )
        generator = np.random.default_rng(0)
        self.prompts = [Prompt(i, tuple(generator.integers(4, 80, generator.integers(3, 30)).tolist())) for i in range(64)]

    def answer(self, *settings: RolloutSettings, cap_tokens: int = 60, prompts: list[Prompt] | None = None) -> list[Any]:
        """One completion per prompt, the settings taking turns within the batch."""
        prompts = prompts or self.prompts
        params = [
            sampling_params(
                prompt,
                LengthLimits(cap_tokens),
                settings[i % len(settings)],
                stop_ids=STOP_IDS,
                context_tokens=CONTEXT_TOKENS,
                seed=i,
                reference_tokens=10.0,
            )
            for i, prompt in enumerate(prompts)
        ]
        return self.generate(prompts, params)

    def generate(self, prompts: list[Prompt], params: list[Any]) -> list[Any]:
        outputs = self.engine.generate([{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    @torch.no_grad()
    def score(self, prompt: Prompt, token_ids: list[int]) -> torch.Tensor:
        """The bare model's logits [T, V] at each position of a response."""
        ids = torch.tensor([[*prompt.token_ids, *token_ids]])
        return self.model(ids).logits[0, len(prompt.token_ids) - 1 : -1]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Student]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
        yield Student(tmp_path_factory.mktemp("student"))


def recorded(completion: Any) -> torch.Tensor:
    return torch.tensor([row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)])


def test_recorded_log_probs_are_those_of_the_ramped_policy_and_only_where_asked(student: Student) -> None:
    plain = RolloutSettings()
    ramped = RolloutSettings(temperature=0.8, stop_ramp=StopRamp(strength_nats=3.0, target_tokens=4, width_tokens=8))
    by_reference = RolloutSettings(stop_ramp=StopRamp(strength_nats=2.0, width_tokens=4))
    num_stops_in_the_ramp = 0
    for i, (prompt, completion) in enumerate(zip(student.prompts, student.answer(plain, ramped, by_reference), strict=True)):
        strength, target, width, temperature = [(0, 0, 1, 1.0), (3, 4, 8, 0.8), (2, 10, 4, 1.0)][i % 3]
        ids = list(completion.token_ids)
        logits_TV = student.score(prompt, ids)
        ramp_T = strength * ((torch.arange(len(ids)) - target) / width).clip(0, 1)
        logits_TV[:, STOP_IDS] += ramp_T[:, None]
        expected_T = (logits_TV / temperature).log_softmax(-1)[range(len(ids)), ids]
        assert (recorded(completion) - expected_T).abs().max() < 1e-3
        num_stops_in_the_ramp += completion.finish_reason == "stop" and bool(ramp_T[-1] > 0)
    assert num_stops_in_the_ramp > 5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_occurs_twice_and_log_probs_know_the_ban(student: Student, n: int) -> None:
    settings = RolloutSettings(no_repeat_ngram=n, temperature=0.5)
    num_bans = 0
    for prompt, completion in zip(student.prompts, student.answer(settings), strict=True):
        ids = list(completion.token_ids)
        ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        assert len(set(ngrams)) == len(ngrams)
        logits_TV = student.score(prompt, ids)
        for end in range(len(ids)):
            seen = {tuple(ids[i : i + n]) for i in range(end - n + 1)}
            for gram in seen:
                if list(gram[:-1]) == ids[end - n + 1 : end]:
                    logits_TV[end, gram[-1]] = -torch.inf
                    num_bans += 1
        expected_T = (logits_TV / 0.5).log_softmax(-1)[range(len(ids)), ids]
        assert (recorded(completion) - expected_T).abs().max() < 1e-3
    assert num_bans > 50


def test_without_the_ban_the_same_requests_repeat_themselves(student: Student) -> None:
    completions = student.answer(RolloutSettings(temperature=0.5))
    bigrams = [list(zip(c.token_ids, c.token_ids[1:], strict=False)) for c in completions]
    assert any(len(set(pairs)) < len(pairs) for pairs in bigrams)


def test_caps_and_the_context_window_are_obeyed(student: Student) -> None:
    for completion in student.answer(RolloutSettings(), cap_tokens=7):
        assert len(completion.token_ids) <= 7
        assert (completion.finish_reason == "length") == (completion.token_ids[-1] not in STOP_IDS)
    long = [Prompt(0, (5, 6) * 126), Prompt(1, (7,) * 255)]
    assert [len(c.token_ids) for c in student.answer(RolloutSettings(min_tokens=60), cap_tokens=60, prompts=long)] == [4, 1]


def test_any_stop_id_ends_a_response_and_no_other_id_does(student: Student) -> None:
    completions = student.answer(RolloutSettings(), cap_tokens=200)
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert {c.stop_reason for c in stopped} == set(STOP_IDS)
    assert all(c.token_ids[-1] == c.stop_reason for c in stopped)
    assert not any(set(STOP_IDS) & set(c.token_ids[:-1]) for c in completions)
    assert any(MODEL_EOS in c.token_ids[:-1] for c in completions)


def test_no_stop_is_sampled_before_min_tokens_even_on_a_ramp(student: Student) -> None:
    settings = RolloutSettings(min_tokens=20, stop_ramp=StopRamp(strength_nats=20.0, target_tokens=1, width_tokens=1))
    assert {len(c.token_ids) for c in student.answer(settings)} == {21}


def test_a_stronger_ramp_gives_shorter_responses(student: Student) -> None:
    lengths = [
        mean(len(c.token_ids) for c in student.answer(RolloutSettings(stop_ramp=StopRamp(strength_nats=strength, width_tokens=8))))
        for strength in (0.0, 2.0, 4.0, 8.0)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.75 * lengths[0]


def test_the_loop_stop_ends_a_loop_that_otherwise_runs_to_the_cap(student: Student) -> None:
    cold = {"temperature": 0.02}
    stop = LoopStop(enabled=True, max_period_tokens=32, min_repeats=4, min_tokens=32)
    free = student.answer(RolloutSettings(**cold), cap_tokens=200)
    ended = student.answer(RolloutSettings(**cold, loop_stop=stop), cap_tokens=200)
    loops = [i for i, c in enumerate(ended) if c.finish_reason == "repetition"]
    assert loops
    for i in loops:
        ids = list(ended[i].token_ids)
        assert len(ids) < len(free[i].token_ids)
        assert find_loop(ids, min_repeats=4, min_tokens=16) is not None  # 16: a plain unit needs twice that
    assert all(c.finish_reason != "repetition" for c in free)


def test_greedy_answers_are_the_models_likeliest_tokens(student: Student) -> None:
    params = [
        greedy_params(prompt, LengthLimits(20), RolloutSettings(), stop_ids=STOP_IDS, context_tokens=CONTEXT_TOKENS)
        for prompt in student.prompts
    ]
    for prompt, completion in zip(student.prompts, student.generate(student.prompts, params), strict=True):
        ids = list(completion.token_ids)
        logits_TV = student.score(prompt, ids)
        assert (logits_TV.max(-1).values - logits_TV[range(len(ids)), ids]).max() < 1e-4
        assert (recorded(completion) - logits_TV.log_softmax(-1)[range(len(ids)), ids]).abs().max() < 1e-3
