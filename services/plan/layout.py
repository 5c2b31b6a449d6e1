"""Which GPU holds what: from a job and hardware to bundles of whole GPUs, or one line that says why not and what would do.

    separate:  [learner 0] [learner 1] [rollout 0, TP 2] [teacher 0] ...      a bundle is a role's own
    colocated: [learner 0 + rollout 0 + teacher 0] [learner 1 + rollout 1 + teacher 1] ...

Settings that the job file names are kept; those it leaves out are chosen: ranks, engines, teacher actors, tensor parallelism.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.plan.hardware import Hardware
from opd_governor.services.plan.memory import GIB, SHRINK, Need, engine_need, learner_need, local_teachers, teacher_need, window_tokens
from opd_governor.services.plan.shapes import Shape, shape_of
from opd_governor.services.plan.times import Load, Rates, learn_s, rollout_s, score_s

WORTH_IT = 0.97
"""A GPU more has to take this much of a phase's time off; else it stays idle, and is said to."""
Transfer = Literal["nccl", "ipc", "file"]
Actor = tuple[str, int]
"""(role, index): ("learner", 0), ("rollout", 3), ("teacher NAME", 1)."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """So many whole GPUs of one node, and the actors on them."""

    num_gpus: int
    actors: tuple[Actor, ...]


@dataclass(frozen=True)
class Plan:
    """What runs where. `job` has the chosen numbers filled in."""

    layout: Literal["colocated", "separate"]
    job: Job
    hardware: Hardware
    bundles: tuple[Bundle, ...]
    needs: tuple[Need, ...]
    transfer: Transfer

    def share(self, role: str) -> float:
        """GPUs that one actor of this role asks Ray for."""
        bundle = next(bundle for bundle in self.bundles if any(name == role for name, _ in bundle.actors))
        return float(bundle.num_gpus) if len(bundle.actors) == 1 else round(1 / len(bundle.actors), 4)

    def place_of(self, role: str, index: int) -> int:
        """The bundle of an actor."""
        return next(i for i, bundle in enumerate(self.bundles) if (role, index) in bundle.actors)

    def lines(self) -> list[str]:
        """For a person: layout and counts, then a line per role with its memory."""
        roles: dict[str, int] = {}
        for bundle in self.bundles:
            for role, _ in bundle.actors:
                roles[role] = roles.get(role, 0) + 1
        used = sum(bundle.num_gpus for bundle in self.bundles)
        idle = f", {self.hardware.num_gpus - used} GPUs idle" if used < self.hardware.num_gpus else ""
        first = f"{self.layout} on {self.hardware.words()}{idle}; weights by {self.transfer}"
        told = [first]
        for need in self.needs:
            terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sorted(need.gpu.items(), key=lambda item: -item[1]) if size)
            gpus = f" of {self.share_words(need.role)}" if self.share(need.role) > 1 else ""
            told.append(f"{roles[need.role]} x {need.role}{gpus}: {need.gpu_bytes / GIB:.1f} GiB a GPU ({terms})")
        return told

    def share_words(self, role: str) -> str:
        return f"{self.share(role):g} GPUs each"


@dataclass(frozen=True)
class _Parts:
    """A job's models and the window they leave."""

    job: Job
    student: Shape
    teachers: list[tuple[TeacherSettings, Shape]]
    window: int

    def needs(self, ranks: int, engine_tp: int, teachers: list[TeacherSettings]) -> list[Need]:
        """Learner, engine and one of each teacher, in this order."""
        scored = [teacher_need(t, shape, self.window) for t, (_, shape) in zip(teachers, self.teachers, strict=True)]
        return [learner_need(self.job, self.student, ranks), engine_need(self.job, self.student, engine_tp, self.window), *scored]


def plan(job: Job, hardware: Hardware) -> Plan:
    """The layout that `cluster.layout` asks for, or the best one. Models are folders or ids whose configs can be read.

    Raises JobError in one line where nothing fits: which role, its largest term, the setting that shrinks it.
    """
    student = shape_of(job.student.model, job.student.trust_remote_code)
    if student.num_experts:
        raise JobError(
            f"student.model: a mixture of {student.num_experts} experts; vLLM's layer-wise reload leaves wrong expert weights in its "
            "engines; distil into a dense student, a mixture as teacher is fine"
        )
    teachers = local_teachers(job)
    parts = _Parts(job, student, teachers, window_tokens(job, student, *(shape for _, shape in teachers)))
    wanted = job.cluster.layout
    found = _separate(parts, hardware) if wanted != "colocated" else "not asked for"
    if isinstance(found, Plan):
        return found
    together = _colocated(parts, hardware) if wanted != "separate" else "not asked for"
    if isinstance(together, Plan):
        return together
    reasons = {"separate": found, "colocated": together}
    told = "; ".join(f"{layout}: {reason}" for layout, reason in reasons.items() if reason != "not asked for")
    raise JobError(f"cluster.layout: {wanted} does not fit {hardware.words()}; {told}")


def too_large(need: Need, hardware: Hardware) -> str:
    """One role that does not fit one GPU, in words."""
    term = need.largest()
    return (
        f"{need.role} needs {need.gpu_bytes / GIB:.1f} GiB a GPU, {hardware.usable_bytes / GIB:.1f} are usable; "
        f"its largest term is {term}, {need.gpu[term] / GIB:.1f} GiB: {SHRINK[term]}"
    )


def _separate(parts: _Parts, hardware: Hardware) -> Plan | str:
    """Every role on GPUs of its own: the least of each, then one more for whichever is slowest, while there are GPUs."""
    job, room, most = parts.job, hardware.usable_bytes, max(hardware.nodes)
    chosen_ranks = job.learner.num_ranks if "num_ranks" in job.learner.model_fields_set else None
    needs = [learner_need(job, parts.student, ranks) for ranks in ([chosen_ranks] if chosen_ranks else range(1, hardware.num_gpus + 1))]
    ranks = next((i + 1 for i, need in enumerate(needs) if need.gpu_bytes <= room), None)
    if ranks is None:
        return too_large(needs[-1], hardware)
    ranks = chosen_ranks or ranks
    given = job.rollout.tensor_parallel_size if "tensor_parallel_size" in job.rollout.model_fields_set else None
    engine_tp = _least_parallel(given, most, parts.student, lambda tp: engine_need(job, parts.student, tp, parts.window).gpu_bytes <= room)
    if engine_tp is None:
        return too_large(engine_need(job, parts.student, given or most, parts.window), hardware)
    teachers = []
    for teacher, shape in parts.teachers:
        given = teacher.tensor_parallel_size if teacher.backend != "vllm" or "tensor_parallel_size" in teacher.model_fields_set else None

        def fits(tp: int, teacher: TeacherSettings = teacher, shape: Shape = shape) -> bool:
            return teacher_need(_with_parallel(teacher, tp), shape, parts.window).gpu_bytes <= room

        tp = _least_parallel(given, most, shape, fits)
        if tp is None:
            return too_large(teacher_need(_with_parallel(teacher, given or most), shape, parts.window), hardware)
        teachers.append(_with_parallel(teacher, tp))
    counts = _grow(parts, hardware, ranks, engine_tp, teachers)
    if counts is None:
        least = [
            *([1] * ranks),
            *([engine_tp] * job.rollout.num_actors),
            *(t.tensor_parallel_size for t in teachers for _ in range(t.num_actors)),
        ]
        return (
            f"{sum(least)} GPUs are needed (learner {ranks}, rollout {job.rollout.num_actors * engine_tp}"
            + "".join(f", teacher {t.name} {t.num_actors * t.tensor_parallel_size}" for t in teachers)
            + f"), there are {hardware.num_gpus}; add {max(1, sum(least) - hardware.num_gpus)}, or serve the teacher over http"
        )
    ranks, num_engines, nums = counts
    teachers = [t.model_copy(update={"num_actors": num}) for t, num in zip(teachers, nums, strict=True)]
    bundles = [Bundle(engine_tp, (("rollout", i),)) for i in range(num_engines)]
    bundles += [Bundle(t.tensor_parallel_size, ((f"teacher {t.name}", i),)) for t in teachers for i in range(t.num_actors)]
    bundles += [Bundle(1, (("learner", i),)) for i in range(ranks)]
    bundles.sort(key=lambda bundle: -bundle.num_gpus)
    filled = _filled(parts, ranks, num_engines, engine_tp, teachers)
    return Plan("separate", filled, hardware, tuple(bundles), tuple(parts.needs(ranks, engine_tp, teachers)), _transfer(job, "nccl"))


def _grow(
    parts: _Parts, hardware: Hardware, ranks: int, engine_tp: int, teachers: list[TeacherSettings]
) -> tuple[int, int, list[int]] | None:
    """Learner ranks, engines, actors of each teacher. None where the least of each finds no room."""
    job, rates, load = parts.job, Rates.of(hardware.card), Load.of(parts.job)
    engines, nums = job.rollout.num_actors, [t.num_actors for t in teachers]
    free = [
        "num_ranks" not in job.learner.model_fields_set,
        *("num_actors" not in role.model_fields_set for role in (job.rollout, *teachers)),
    ]

    def units(ranks: int, engines: int, nums: list[int]) -> list[int]:
        return [1] * ranks + [engine_tp] * engines + [t.tensor_parallel_size for t, n in zip(teachers, nums, strict=True) for _ in range(n)]

    if not hardware.holds(units(ranks, engines, nums)):
        return None

    def times(ranks: int, engines: int, nums: list[int]) -> list[float]:
        """Learner, engines, each teacher."""
        scored = [
            score_s(shape, load, rates, num * teacher.tensor_parallel_size) / len(teachers)
            for teacher, (_, shape), num in zip(teachers, parts.teachers, nums, strict=True)
        ]
        return [learn_s(job, parts.student, load, rates, ranks), rollout_s(job, parts.student, load, rates, engines, engine_tp), *scored]

    while True:
        now = times(ranks, engines, nums)
        by_time = sorted((i for i, is_free in enumerate(free) if is_free), key=lambda i: -now[i])
        # Phases of neighbouring steps overlap, so that the slowest one is the step; in the strict loop they add up.
        for role in by_time[: None if job.strict else 1]:
            grown = ranks + (role == 0), engines + (role == 1), [num + (role == i) for i, num in enumerate(nums, 2)]
            if hardware.holds(units(*grown)) and times(*grown)[role] < WORTH_IT * now[role]:
                ranks, engines, nums = grown
                break
        else:
            return ranks, engines, nums


def _colocated(parts: _Parts, hardware: Hardware) -> Plan | str:
    """Learner rank, engine and teachers on every GPU (or on as many as the job names ranks)."""
    job = parts.job
    if any(t.backend == "vllm" and t.tensor_parallel_size > 1 for t, _ in parts.teachers) or job.rollout.tensor_parallel_size > 1:
        return "tensor parallelism needs GPUs of its own: set tensor_parallel_size to 1 or add GPUs"
    num = job.learner.num_ranks if "num_ranks" in job.learner.model_fields_set else hardware.num_gpus
    if num > hardware.num_gpus:
        return f"learner.num_ranks {num} are more than the GPUs"
    teachers = [t for t, _ in parts.teachers]
    needs = parts.needs(num, 1, teachers)
    spare = hardware.usable_bytes - sum(need.gpu_bytes for need in needs)
    if spare < 0:
        worst = max(needs, key=lambda need: need.gpu_bytes)
        term = worst.largest()
        sums = ", ".join(f"{need.role} {need.gpu_bytes / GIB:.1f}" for need in needs)
        return (
            f"{sum(need.gpu_bytes for need in needs) / GIB:.1f} GiB a GPU are needed ({sums}), "
            f"{hardware.usable_bytes / GIB:.1f} are usable; "
            f"the largest term is {worst.role}'s {term}, {worst.gpu[term] / GIB:.1f} GiB: {SHRINK[term]}"
        )
    each: list[list[Actor]] = [[("learner", i), ("rollout", i)] for i in range(num)]
    nums = [t.num_actors if "num_actors" in t.model_fields_set else num for t in teachers]
    for t, wanted in zip(teachers, nums, strict=True):
        for i in range(wanted):
            each[i % num].append((f"teacher {t.name}", i))
    teachers = [t.model_copy(update={"num_actors": n}) for t, n in zip(teachers, nums, strict=True)]
    kv = int(needs[1].gpu["KV cache"] + 0.8 * spare)
    engine = replace(needs[1], gpu=needs[1].gpu | {"KV cache": float(kv)})
    filled = _sharing(_filled(parts, num, num, 1, teachers), hardware, (needs[0], engine, *needs[2:]))
    bundles = tuple(Bundle(1, tuple(actors)) for actors in each)
    return Plan("colocated", filled, hardware, bundles, (needs[0], engine, *needs[2:]), _transfer(job, "ipc"))


def _transfer(job: Job, by_gpu: Transfer) -> Transfer:
    """An addition is small and always travels as a file."""
    return by_gpu if job.student.lora is None else "file"


def _filled(parts: _Parts, ranks: int, engines: int, engine_tp: int, teachers: list[TeacherSettings]) -> Job:
    job, by_name = parts.job, {t.name: t for t in teachers}
    return job.model_copy(
        update={
            "learner": job.learner.model_copy(update={"num_ranks": ranks}),
            "rollout": job.rollout.model_copy(update={"num_actors": engines, "tensor_parallel_size": engine_tp}),
            "teacher": tuple(by_name.get(t.name, t) for t in job.teacher),
        }
    )


def _sharing(job: Job, hardware: Hardware, needs: tuple[Need, ...]) -> Job:
    """Each vLLM engine is told what it may take, instead of measuring what others have not yet taken."""

    def told(need: Need, cache: str, own: dict[str, Any]) -> dict[str, Any]:
        share = need.gpu_bytes / (hardware.gib * GIB)
        return {"gpu_memory_utilization": round(share, 3), "engine": {"kv_cache_memory_bytes": int(need.gpu[cache])} | own}

    by_role = {need.role: need for need in needs}
    teachers = tuple(
        t.model_copy(update=told(by_role[f"teacher {t.name}"], "teacher KV cache", t.engine))
        if t.backend == "vllm" and f"teacher {t.name}" in by_role
        else t
        for t in job.teacher
    )
    rollout = job.rollout.model_copy(update=told(by_role["rollout"], "KV cache", job.rollout.engine))
    return job.model_copy(update={"rollout": rollout, "teacher": teachers})


def _with_parallel(teacher: TeacherSettings, tp: int) -> TeacherSettings:
    return teacher.model_copy(update={"tensor_parallel_size": tp})


def _least_parallel(given: int | None, most: int, shape: Shape, fits: Callable[[int], bool]) -> int | None:
    """The smallest tensor parallelism that fits: a power of two within a node that divides the heads; or the one that was given."""
    sizes = [given] if given else [tp for tp in (1, 2, 4, 8) if tp <= most and shape.num_heads % tp == 0]
    return next((tp for tp in sizes if fits(tp)), None)
