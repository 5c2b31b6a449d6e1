"""`opd check` against described hardware: the plan, what GPUs are known not to do, and vLLM's own arguments."""

from pathlib import Path

from opd_governor.services.inputs.fit import check_dry, check_engine_arguments, check_fit
from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.hardware import parse_gpus

JOBS = Path(__file__).parents[3] / "deploy/jobs"


def job_of(name: str, *changes: str) -> Job:
    return load_job(JOBS / f"{name}.yaml", changes)


def found(job: Job, gpus: str) -> dict[str, str]:
    """Status by name of the check; the last of a name."""
    return {check.name: check.status for check in check_dry(job, parse_gpus(gpus))}


def test_a_job_that_fits_shows_its_plan_and_nothing_else() -> None:
    assert set(found(job_of("qwen3-8-gpus"), "8x80").values()) == {"pass"}


def test_a_job_that_does_not_is_one_failure_with_the_term_and_the_setting() -> None:
    (check,) = check_fit(job_of("qwen3-8-gpus"), parse_gpus("1x24"))
    assert check.status == "fail"
    assert "its largest term is moments" in check.detail
    assert "raise learner.num_ranks" in check.detail


def test_a_mixture_as_student_is_refused_and_as_teacher_is_not() -> None:
    (check,) = check_fit(job_of("qwen3-8-gpus", "student.model=Qwen/Qwen3-30B-A3B"), parse_gpus("64x80"))
    assert check.status == "fail"
    assert "student.model: a mixture of 128 experts" in check.detail
    assert set(found(job_of("qwen3-32-gpus"), "32x80").values()) == {"pass"}


def test_slow_settings_are_named() -> None:
    told = found(job_of("qwen3-1-gpu", "rollout.dtype=float32", "rollout.enforce_eager=true"), "8x80")
    assert told["dtype on GPUs"] == told["CUDA graphs"] == "warn"


def test_an_argument_that_vllm_has_not_is_a_mistake_in_the_job() -> None:
    (check,) = check_engine_arguments(job_of("qwen3-8-gpus", "rollout.engine={kv_cache_dtyp: fp8}"))
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "rollout.engine: vLLM has no argument 'kv_cache_dtyp'; did you mean kv_cache_dtype?" in check.line()
    (check,) = check_engine_arguments(job_of("qwen3-8-gpus", "rollout.engine={kv_cache_dtype: fp8}"))
    assert check.status == "pass"
