"""The governor inside TRL: a callback that reads completions and turns the knobs TRL reads at run time.

    generate --lengths, ends, loops--> LengthGovernorCallback --StepSeen--> OutsideGovernor, or `opd govern` over HTTP
       <------ cap, learning rate, beta, lmbda, stop, rollback ------------- limits

It is no subclass trick: the trainer stays TRL's. `attach` wraps the one method through which completions pass.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from opd_governor.actors.governor.actuators import ACTUATORS
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.client import GovernorClient
from opd_governor.services.sidecar.golden import GoldenLengths
from opd_governor.services.sidecar.governing import OutsideGovernor, without
from opd_governor.services.sidecar.knobs import KNOBS
from opd_governor.services.sidecar.seen import StepSeen, ends_in_loop

log = logging.getLogger(__name__)

NEEDS = {"cap_tokens": "cap", "golden_weight": "lmbda", "reference_kl_weight": "beta"}
"""Actuator -> the knob that it needs. The learning rate every trainer has; a rollback needs checkpoints; the rest no TRL trainer has."""


class Adviser(Protocol):
    """Who decides: the law in this process, or a service."""

    def advise(self, seen: StepSeen, finish_reasons: Sequence[str], golden: GoldenLengths) -> dict[str, Any]:
        """The answer as JSON values (`Answer.to_json`)."""


class _Here:
    def __init__(self, policy: Policy) -> None:
        self.governor = OutsideGovernor(policy)

    def leave(self, *actuators: str) -> None:
        """What this trainer has no knob for would be promised and never moved."""
        self.governor.policy = without(self.governor.policy, *actuators)

    def advise(self, seen: StepSeen, finish_reasons: Sequence[str], golden: GoldenLengths) -> dict[str, Any]:
        return self.governor.observe(seen, golden.finished, reference_cut=golden.cut).to_json()


class _Service:
    def __init__(self, client: GovernorClient) -> None:
        self._client = client

    def advise(self, seen: StepSeen, finish_reasons: Sequence[str], golden: GoldenLengths) -> dict[str, Any]:
        """The last limits again where the service is away."""
        return self._client.step(
            seen.step,
            lengths=list(seen.lengths),
            finish_reasons=list(finish_reasons),
            reference_lengths=list(golden.finished) or None,
            reference_cut_lengths=list(golden.cut) or None,
            cap_tokens=seen.cap_tokens,
            loops=seen.loops,
            kl_nats=seen.kl_nats,
            learning_rate=seen.learning_rate,
        )


class LengthGovernorCallback(TrainerCallback):
    """Governs the length of a TRL trainer's completions.

    >>> governor = LengthGovernorCallback()                            # doctest: +SKIP
    >>> trainer = DistillationTrainer(..., callbacks=[governor])       # doctest: +SKIP
    >>> governor.train(trainer)                                        # doctest: +SKIP
    """

    def __init__(
        self,
        service: str | GovernorClient | None = None,
        *,
        run: str = "trl",
        token: str | None = None,
        policy: Policy | None = None,
        reference: GoldenLengths | Sequence[int] = (),
        out: Path | str | None = None,
    ) -> None:
        """Without `service` (the URL of `opd govern`, or a client) the law runs in this process under `policy`.

        `reference`: how long answers ought to be, from `golden_lengths`, or lengths in tokens of your own data; empty: the run's
        first steps serve. `out`: folder for metrics.jsonl and decisions.jsonl; None: the trainer's output_dir / governor.
        """
        client = GovernorClient(service, run=run, token=token) if isinstance(service, str) else service
        self._adviser: Adviser = _Service(client) if client else _Here(policy or Policy())
        self._golden = reference if isinstance(reference, GoldenLengths) else GoldenLengths(tuple(reference))
        self._out = Path(out) if out else None
        self._trainer: Any = None
        self._held: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._lengths: list[int] = []
        self._reasons: list[str] = []
        self._loops = 0
        self._step = 0
        self._lr_scale = 1.0
        self._rewarded = False
        self._healthy_at = 0
        self._checkpoints: list[tuple[int, str]] = []
        self._rollback_to: str | None = None
        self.answer: dict[str, Any] | None = None
        """What was decided after the newest step; None before the first."""

    # ---- the user's side

    def attach(self, trainer: Any) -> None:
        """Read this trainer's completions and turn its knobs. Raises ValueError for one without a place to read them."""
        if self._trainer is trainer:
            return
        self._trainer = trainer
        if hasattr(trainer, "generate_on_policy_outputs"):  # GOLD, GKD: rows of ids with labels on the completion
            trainer.generate_on_policy_outputs = self._watch(trainer.generate_on_policy_outputs, _of_labels)
        elif hasattr(trainer, "_generate"):  # Distillation, GRPO: ids of each completion stand second
            trainer._generate = self._watch(trainer._generate, lambda result: result[1])
        else:
            raise ValueError(
                f"{type(trainer).__name__} of this TRL has no method through which completions pass; use `opd govern --proxy` instead"
            )
        self._held = {name: value for name, knob in KNOBS.items() if (value := knob.reads(trainer)) is not None}
        self._rewarded = hasattr(trainer, "reward_funcs")
        if isinstance(self._adviser, _Here):
            has = {actuator for actuator, knob in NEEDS.items() if knob in self._held} | {"lr_scale"}
            if str(getattr(trainer.args, "save_strategy", "no")).rpartition(".")[2].lower() != "no":
                has.add("rollback")
            self._adviser.leave(*(name for name in ACTUATORS if name not in has))

    def train(self, trainer: Any, **arguments: Any) -> Any:
        """`trainer.train()`, and again from the last healthy checkpoint when the governor asks for a rollback."""
        self.attach(trainer)
        result = trainer.train(**arguments)
        while self._rollback_to is not None:
            checkpoint, self._rollback_to = self._rollback_to, None
            log.warning("length governor: back to %s", checkpoint)
            result = trainer.train(resume_from_checkpoint=checkpoint)
        return result

    # ---- TRL's side

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any) -> None:
        self._scale_lr(optimizer, lr_scheduler)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The schedule wrote its own value after the last step; ours must stand when the optimizer reads it."""
        told = self._told.get("learning rate")
        if told is not None and optimizer is not None and abs(optimizer.param_groups[0]["lr"] - told) > 1e-9 * max(told, 1e-12):
            self._say_ignored("the learning rate", told, optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer is None:
            raise ValueError("LengthGovernorCallback does not know its trainer: call governor.attach(trainer) before trainer.train()")
        self._step = state.global_step
        lengths, reasons, loops = self._gathered()
        self._lengths, self._reasons, self._loops = [], [], 0
        if not lengths:
            return  # a step on completions sampled before
        cap = self._told.get("cap", self._held.get("cap"))
        if cap is not None and max(lengths) > cap:
            self._say_ignored("the cap", cap, max(lengths))
        last = state.log_history[-1] if state.log_history else {}
        seen = StepSeen.of_completions(
            state.global_step,
            lengths,
            reasons,
            cap_tokens=cap,
            loops=loops / len(lengths),
            # A distillation trainer's loss is its divergence from the teacher; a rewarded one logs its KL apart.
            kl_nats=last.get("kl", None if self._rewarded else last.get("loss")),
            learning_rate=last.get("learning_rate"),
        )
        golden, self._golden = self._golden, GoldenLengths(())
        self.answer = self._adviser.advise(seen, reasons, golden)
        self._obey(self.answer, control)
        self._record(args, seen, self.answer)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._healthy_at == state.global_step:
            self._checkpoints.append((state.global_step, str(Path(args.output_dir) / f"checkpoint-{state.global_step}")))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Beside the trainer's own figures, in its trackers and its trainer_state.json."""
        if self.answer is None or logs is None or "loss" not in logs:
            return
        told = {"governor/pressure": self.answer["pressure"], "governor/lr_scale": self._lr_scale}
        if (cap := self._told.get("cap")) is not None:
            told["governor/cap_tokens"] = cap
        logs.update(told)
        state.log_history[-1].update(told)

    # ---- inside

    def _watch(self, method: Callable[..., Any], completions_of: Callable[[Any], Sequence[Sequence[int]]]) -> Callable[..., Any]:
        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if self._trainer.model.training:
                self._see(completions_of(result))
            return result

        return watched

    def _see(self, completions: Sequence[Sequence[int]]) -> None:
        stop_ids = _stop_ids(self._trainer)
        for ids in completions:
            self._lengths.append(len(ids))
            self._reasons.append("stop" if len(ids) and ids[-1] in stop_ids else "length")
            self._loops += ends_in_loop(ids, stop_ids)

    def _gathered(self) -> tuple[list[int], list[str], int]:
        """Of every process, the same in each."""
        accelerator = getattr(self._trainer, "accelerator", None)
        if accelerator is None or accelerator.num_processes == 1:
            return self._lengths, self._reasons, self._loops
        from accelerate.utils import gather_object

        parts = gather_object([(self._lengths, self._reasons, self._loops)])
        return [n for part in parts for n in part[0]], [r for part in parts for r in part[1]], sum(part[2] for part in parts)

    def _obey(self, answer: dict[str, Any], control: Any) -> None:
        given = answer["limits"]
        limits = LengthLimits(**given | {"cap_tokens": given["cap_tokens"] or self._held.get("cap", 1)})
        for name, held in self._held.items():
            wanted = KNOBS[name].wanted(limits, held)
            if wanted is not None and wanted != self._told.get(name, held):
                KNOBS[name].writes(self._trainer, wanted)
                self._told[name] = wanted
                if (found := KNOBS[name].reads(self._trainer)) != wanted:
                    self._say_ignored(name, wanted, found)
        self._lr_scale = limits.lr_scale
        if answer["healthy"]:
            self._healthy_at = self._step
        if "checkpoint" in answer.get("asked", ()):
            control.should_save = True
        if answer["action"] == "stop" or "stop" in answer.get("asked", ()):
            log.warning("length governor: stop: %s", answer["reason"])
            control.should_training_stop = True
        elif answer["action"] == "rollback" and (kept := [path for _, path in self._checkpoints if Path(path).is_dir()]):
            self._rollback_to = kept[-1]
            control.should_training_stop = True
        elif answer["action"] == "rollback":
            log.warning("length governor: a rollback is due and no healthy checkpoint was saved; save_strategy='steps' keeps some")

    def _scale_lr(self, optimizer: Any, scheduler: Any) -> None:
        """The schedule's value times the brake, in force for this very step."""
        if optimizer is None or scheduler is None:
            return
        if self._lr_scale == 1.0:
            self._told.pop("learning rate", None)
            return
        for group, scheduled in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = scheduled * self._lr_scale
        self._told["learning rate"] = optimizer.param_groups[0]["lr"]

    def _say_ignored(self, what: str, told: float, found: float | None) -> None:
        log.warning("length governor: this version of TRL ignores %s: told %g, found %s at step %d", what, told, found, self._step)

    def _record(self, args: Any, seen: StepSeen, answer: dict[str, Any]) -> None:
        accelerator = getattr(self._trainer, "accelerator", None)
        if accelerator is not None and not accelerator.is_main_process:
            return
        out = self._out or Path(args.output_dir) / "governor"
        out.mkdir(parents=True, exist_ok=True)
        limits = answer["limits"]
        step = {
            "step": seen.step,
            "num_rollouts": len(seen.lengths),
            "lengths": list(seen.lengths),
            "length_mean": seen.length_mean_tokens,
            "length_p95": seen.length_p95_tokens,
            "length_max": seen.length_max_tokens,
            "truncation": seen.truncation,
            "loops": seen.loops,
            "cap_tokens": seen.cap_tokens,
            "learning_rate": seen.learning_rate,
            "pressure": answer["pressure"],
            "lr_scale": limits["lr_scale"],
        }
        for name, record in (("metrics.jsonl", step), ("decisions.jsonl", answer)):
            with (out / name).open("a") as file:
                file.write(json.dumps(record) + "\n")


def _of_labels(result: Sequence[Any]) -> list[list[int]]:
    """Completions of (input ids, mask, labels, ...): where a label stands. [B, T] tensors."""
    ids_BT, labels_BT = result[0].tolist(), result[2].tolist()
    return [[i for i, label in zip(row, labels, strict=True) if label != -100] for row, labels in zip(ids_BT, labels_BT, strict=True)]


def _stop_ids(trainer: Any) -> frozenset[int]:
    """What ends a completion, as the trainer itself counts it."""
    stops = getattr(trainer, "eos_token_ids", None) or getattr(getattr(trainer, "generation_config", None), "eos_token_id", None)
    tokenizer = getattr(trainer, "processing_class", None)
    stops = stops if stops is not None else getattr(tokenizer, "eos_token_id", None)
    return frozenset([stops] if isinstance(stops, int) else stops or ())
