"""The planner on described hardware: what it chooses, what it keeps, what it refuses and how it says so."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.plan.forecast import forecast
from opd_governor.services.plan.hardware import Hardware, parse_gpus
from opd_governor.services.plan.layout import Plan, plan
from opd_governor.services.plan.memory import GIB
from opd_governor.services.plan.shapes import SHIPPED, shape_of

JOBS = Path(__file__).parents[3] / "deploy/jobs"


def job_of(name: str = "qwen3-8-gpus", **changes: Any) -> Job:
    return load_job(JOBS / f"{name}.yaml", tuple(f"{key}={value}" for key, value in changes.items()))


def gpus_of(found: Plan) -> int:
    return sum(bundle.num_gpus for bundle in found.bundles)


def count(found: Plan, role: str) -> int:
    return sum(name == role for bundle in found.bundles for name, _ in bundle.actors)


@pytest.mark.parametrize(
    ("text", "nodes"), [("8x80", (8,)), ("12x80", (8, 4)), ("4x8x80", (8, 8, 8, 8)), ("1x24", (1,)), ("2x4x141", (4, 4))]
)
def test_hardware_is_described_by_gpus_and_their_memory(text: str, nodes: tuple[int, ...]) -> None:
    assert parse_gpus(text).nodes == nodes


@pytest.mark.parametrize("text", ["", "8", "0x80", "8x0", "8*80", "0x8x80", "x80"])
def test_other_descriptions_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(JobError, match="such as 8x80"):
        parse_gpus(text)


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.json")])
def test_shipped_configs_have_the_parameters_of_their_name(name: str) -> None:
    billions = float(re.search(r"([\d.]+)B", name)[1])  # type: ignore[index]
    assert shape_of(name).num_parameters / 1e9 == pytest.approx(billions, rel=0.1)


@pytest.mark.parametrize(("name", "gpus"), [("qwen3-1-gpu", "1x80"), ("qwen3-8-gpus", "8x80"), ("qwen3-32-gpus", "32x80")])
def test_the_example_jobs_fit_what_they_are_named_for(name: str, gpus: str) -> None:
    found = plan(job_of(name), parse_gpus(gpus))
    assert gpus_of(found) <= found.hardware.num_gpus
    assert all(need.gpu_bytes <= found.hardware.usable_bytes for need in found.needs)


@settings(max_examples=40, deadline=None)
@given(nodes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4), gib=st.sampled_from([24, 40, 80, 141, 180]))
@pytest.mark.parametrize("name", ["qwen3-1-gpu", "qwen3-8-gpus"])
def test_a_plan_fits_its_hardware_and_places_every_actor_once(name: str, nodes: list[int], gib: float) -> None:
    hardware = Hardware(tuple(sorted(nodes, reverse=True)), gib)
    try:
        found = plan(job_of(name), hardware)
    except JobError as error:
        told = str(error)
        assert "\n" not in told
        assert re.search(r"largest term is|GPUs are needed", told)
        return
    assert hardware.holds([bundle.num_gpus for bundle in found.bundles])
    placed = [actor for bundle in found.bundles for actor in bundle.actors]
    assert len(placed) == len(set(placed))
    assert count(found, "learner") == found.job.learner.num_ranks
    assert count(found, "rollout") == found.job.rollout.num_actors
    together = sum(need.gpu_bytes for need in found.needs) if found.layout == "colocated" else max(need.gpu_bytes for need in found.needs)
    assert together <= hardware.usable_bytes


def test_numbers_that_the_file_names_are_kept() -> None:
    found = plan(job_of(**{"learner.num_ranks": 5, "rollout.num_actors": 1, "rollout.tensor_parallel_size": 2}), parse_gpus("16x80"))
    assert (count(found, "learner"), count(found, "rollout")) == (5, 1)
    assert found.share("rollout") == 2


def test_engines_that_share_a_gpu_are_told_what_they_may_take() -> None:
    found = plan(job_of("qwen3-1-gpu"), parse_gpus("1x80"))
    engine = found.job.rollout.engine["kv_cache_memory_bytes"]
    assert engine == pytest.approx(next(need for need in found.needs if need.role == "rollout").gpu["KV cache"], abs=2)
    taken = found.job.rollout.gpu_memory_utilization + found.job.teacher[0].gpu_memory_utilization
    learner = next(need for need in found.needs if need.role == "learner").gpu_bytes / (80 * GIB)
    assert taken + learner < 0.95


def test_a_layout_that_is_asked_for_is_taken_or_refused() -> None:
    assert plan(job_of("qwen3-1-gpu", **{"cluster.layout": "colocated"}), parse_gpus("8x80")).layout == "colocated"
    with pytest.raises(JobError, match=r"cluster.layout: separate does not fit 2 GPUs.*3 GPUs are needed.*add 1"):
        plan(job_of("qwen3-1-gpu", **{"cluster.layout": "separate"}), parse_gpus("2x80"))
    with pytest.raises(JobError, match="tensor parallelism needs GPUs of its own"):
        plan(job_of("qwen3-1-gpu", **{"cluster.layout": "colocated", "rollout.tensor_parallel_size": 2}), parse_gpus("2x80"))


@pytest.mark.parametrize(
    ("changes", "term", "remedy"),
    [
        ({"learner.micro_batch_tokens": 262144, "learner.gradient_checkpointing": "false"}, "activations", "gradient_checkpointing"),
        ({"learner.chunk_tokens": 65536, "learner.micro_batch_tokens": 65536}, "loss", "learner.chunk_tokens"),
    ],
)
def test_the_largest_term_is_named_with_the_setting_that_shrinks_it(changes: dict[str, Any], term: str, remedy: str) -> None:
    with pytest.raises(JobError, match=rf"its largest term is {term}.*{remedy}"):
        plan(job_of("qwen3-1-gpu", **changes, **{"learner.num_ranks": 1}), parse_gpus("8x80"))


def test_more_gpus_never_make_a_step_slower_and_the_advice_names_the_slowest() -> None:
    steps = [forecast(plan(job_of("qwen3-32-gpus"), parse_gpus(f"{num}x80"))) for num in (8, 16, 32)]
    assert steps[0].step_s >= steps[1].step_s >= steps[2].step_s
    keys = {"rollout": "rollout.num_actors", "score": "teacher.num_actors", "learn": "learner.num_ranks"}
    assert all(keys[told.slowest.name] in told.advice() for told in steps)


def test_a_teacher_behind_http_takes_no_gpu() -> None:
    job = job_of("qwen3-8-gpus")
    away = job.teacher[0].model_copy(update={"backend": "http", "url": "http://127.0.0.1:8000"})
    found = plan(job.model_copy(update={"teacher": (away,)}), parse_gpus("8x80"))
    assert not any(role.startswith("teacher") for bundle in found.bundles for role, _ in bundle.actors)


def test_a_lora_student_has_a_frozen_base_and_moves_its_addition_alone() -> None:
    """Of Qwen3-1.7B in bfloat16: no float32 copy and no moments of the base, no reference beside it, few bytes to the engines."""
    full, lora = (forecast(plan(job_of("qwen3-1-gpu", **more), parse_gpus("1x80"))) for more in ({}, {"student.lora": "{rank: 16}"}))
    needs = [{need.role: need for need in told.plan.needs} for told in (full, lora)]
    base, trained = shape_of("Qwen3-1.7B").num_parameters, 28 * 16 * 38912
    """Ranks of A and B over the seven linear layers: 4 x 2048 + 2 x 1024 + 2 x 2048 + 6144 x 3 + 2048 x 3."""
    learner = needs[1]["learner"].gpu
    assert learner["weights"] == 2 * base + 4 * trained
    assert learner["moments"] == 8 * trained
    assert "reference" not in learner
    assert needs[1]["learner"].gpu_bytes < 0.4 * needs[0]["learner"].gpu_bytes
    assert needs[1]["rollout"].gpu["versions of the addition"] == 3 * 2 * trained
    assert lora.plan.transfer == "file"
    syncs, learns = ([next(p for p in told.phases if p.name == name) for told in (full, lora)] for name in ("sync", "learn"))
    assert syncs[1].network_gib * GIB == 4 * trained
    assert syncs[1].seconds < 0.03 * syncs[0].seconds
    assert learns[1].seconds < learns[0].seconds
