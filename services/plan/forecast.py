"""What a step of a plan takes, phase by phase, who waits for whom, and which role one more GPU would help."""

from dataclasses import dataclass
from typing import Any

from opd_governor.services.plan.layout import Plan
from opd_governor.services.plan.memory import GIB, local_teachers, sync_bytes, trained_parameters
from opd_governor.services.plan.shapes import BYTES, shape_of
from opd_governor.services.plan.times import Load, Rates, learn_s, rollout_s, score_s, sync_s


@dataclass(frozen=True)
class Phase:
    """One phase of a step."""

    name: str
    seconds: float
    gpus: int
    network_gib: float
    """Sent between roles in one step."""


@dataclass(frozen=True)
class Forecast:
    """Phases in their order; the plan they belong to."""

    plan: Plan
    phases: tuple[Phase, ...]
    step_s: float
    tokens_per_s: float

    @property
    def slowest(self) -> Phase:
        return max((phase for phase in self.phases if phase.name != "sync"), key=lambda phase: phase.seconds)

    def waits(self) -> list[str]:
        """Who waits for whom, in words."""
        slow = self.slowest
        busy = {phase.name: phase.seconds / self.step_s for phase in self.phases if phase.name != "sync"}
        told = [f"{name} is busy {share:.0%} of a step" for name, share in busy.items()]
        if self.plan.job.strict:
            return [*told, "rollout.max_staleness 0: phases follow one another, everybody waits for everybody"]
        others = ", ".join(name for name in busy if name != slow.name)
        return [*told, f"{others} wait for {slow.name}"]

    def advice(self) -> str:
        """Which role to add next."""
        slow = self.slowest
        key = {"rollout": "rollout.num_actors", "score": "teacher.num_actors", "learn": "learner.num_ranks"}[slow.name]
        if self.plan.layout == "colocated":
            return f"{slow.name} is the slowest: more GPUs, or a layout of its own for it (cluster.layout: separate), help first"
        passes = "; it is bound by its passes, not by GPUs: raise rollout.prompts_per_step" if slow.name == "rollout" and self._idle else ""
        return f"add to {slow.name} next ({key}){passes}"

    @property
    def _idle(self) -> bool:
        return sum(bundle.num_gpus for bundle in self.plan.bundles) < self.plan.hardware.num_gpus

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "layout": self.plan.layout,
            "transfer": self.plan.transfer,
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "phases": [{"name": p.name, "seconds": p.seconds, "gpus": p.gpus, "network_gib": p.network_gib} for p in self.phases],
            "memory_gib": {need.role: {term: size / GIB for term, size in need.gpu.items()} for need in self.plan.needs},
            "host_gib": {need.role: {term: size / GIB for term, size in need.host.items()} for need in self.plan.needs},
            "bundles": [{"gpus": b.num_gpus, "actors": [f"{role} {index}" for role, index in b.actors]} for b in self.plan.bundles],
            "next": self.advice(),
        }


def forecast(plan: Plan, rates: Rates | None = None, load: Load | None = None) -> Forecast:
    """Times from the card's data sheet and from shares of it that were reached (see times.py); `rates` replaces them where measured."""
    job, student = plan.job, shape_of(plan.job.student.model, plan.job.student.trust_remote_code)
    rates, load = rates or Rates.of(plan.hardware.card), load or Load.of(job)
    engines, tp, ranks = job.rollout.num_actors, job.rollout.tensor_parallel_size, job.learner.num_ranks
    teachers = local_teachers(job)
    scoring = [score_s(shape, load, rates, t.num_actors * t.tensor_parallel_size) / len(teachers) for t, shape in teachers]
    per_token = 8 * job.objective.top_k if job.objective.support in ("teacher", "student", "union") else 8
    answers_gib = load.rollouts * load.answer_tokens * per_token / GIB
    # nccl sends to every engine, the object store to every node; ipc sends nothing over a network.
    copies = {"nccl": engines, "file": len(plan.hardware.nodes), "ipc": 0}[plan.transfer]
    # Ranks gather each weight twice and reduce the gradients of those that are trained.
    moved = 2 * BYTES[job.learner.dtype] * student.num_parameters + 4 * trained_parameters(job, student)
    phases = (
        Phase("rollout", rollout_s(job, student, load, rates, engines, tp), engines * tp, answers_gib),
        Phase("score", max(scoring, default=0.0), sum(t.num_actors * t.tensor_parallel_size for t, _ in teachers), answers_gib),
        Phase("learn", learn_s(job, student, load, rates, ranks), ranks, moved * (ranks - 1) / ranks / GIB),
        Phase("sync", sync_s(job, student, rates), engines * tp, sync_bytes(job, student) * copies / GIB),
    )
    apart = [phase.seconds for phase in phases[:3]]
    shared = plan.layout == "colocated" or job.strict
    step = (sum(apart) if shared else max(apart)) + phases[3].seconds
    return Forecast(plan, phases, step, load.rollouts * load.answer_tokens / step)


def render(told: Forecast) -> str:
    """For a terminal."""
    lines = [*told.plan.lines(), "", f"{'phase':<8} {'seconds':>8} {'GPUs':>5} {'network GiB':>12}"]
    lines += [f"{p.name:<8} {p.seconds:8.2f} {p.gpus:5d} {p.network_gib:12.2f}" for p in told.phases]
    host = ", ".join(f"{need.role} {need.host_bytes / GIB:.0f} GiB" for need in told.plan.needs if need.host)
    lines += ["", f"a step: {told.step_s:.1f} s, {told.tokens_per_s:,.0f} response tokens/s", f"host memory a process: {host}"]
    assumed = f"assumed: {told.plan.hardware.card.name}, answers half the cap; see services/plan/times.py for the shares of its rates"
    return "\n".join([*lines, *told.waits(), told.advice(), assumed])
