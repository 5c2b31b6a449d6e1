"""Checks of the machine and the job's settings: folder, disk, port, Prometheus, packages, precision."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch

from opd_governor.services.control.server import ServiceError, bind
from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.lora import trained_parameters
from opd_governor.services.inputs.refusals import words
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job

ADAM_BYTES_PER_PARAMETER = 12
"""A checkpoint's float32 master weight and two moments."""
COMPILERS = (os.environ.get("CXX") or "g++", "gcc", "clang")
"""What torch.compile calls, on CPUs the first."""
PROMETHEUS_TIMEOUT_S = 3.0


def check_folder(directory: Path) -> Iterator[Check]:
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Check("output folder", "fail", f"--out {directory}: {place} is not a folder that can be written", "choose another folder")
    else:
        yield Check("output folder", "pass", str(directory))


def check_disk(job: Job, student: ModelFacts, directory: Path) -> Iterator[Check]:
    weights = sum(file.stat().st_size for file in Path(student.model).glob("*.safetensors"))
    if not weights:
        return  # a hub id: its size is not known before it is fetched
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    bytes_per_parameter = 2 if getattr(student.config, "dtype", None) in (torch.bfloat16, torch.float16) else 4
    each = weights / bytes_per_parameter * (bytes_per_parameter + ADAM_BYTES_PER_PARAMETER)
    if job.student.lora is not None:
        each = trained_parameters(student, job.student) * (4 + ADAM_BYTES_PER_PARAMETER)
    elif job.follow is not None:
        each += 4 * weights / bytes_per_parameter
    needed = (job.checkpoint.keep + 2) * each
    free = shutil.disk_usage(place).free
    detail = f"{free / 2**30:.1f} GiB free at {place}, checkpoints need about {needed / 2**30:.1f}"
    if free < needed:
        yield Check("disk space", "fail", detail, "free some, choose another --out or lower checkpoint.keep")
    else:
        yield Check("disk space", "pass", detail)


def check_service(job: Job) -> Iterator[Check]:
    try:
        bind(job.service.host, job.service.port, "token").close()
    except ServiceError as error:
        yield Check("port", "fail", str(error))
    else:
        yield Check("port", "pass", f"{job.service.host}:{job.service.port or 'a free one'}")
    if (url := job.service.prometheus_url) is None:
        return
    try:
        answer = httpx.get(f"{url.rstrip('/')}/-/ready", timeout=PROMETHEUS_TIMEOUT_S)
        problem = "" if answer.status_code == 200 else f"answers {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = words(error)
    if problem:
        yield Check(
            "prometheus", "fail", f"service.prometheus_url {url}: {problem}", "start the server or unset it: the run's own /metrics serve"
        )
    else:
        yield Check("prometheus", "pass", url)


def check_objective(job: Job) -> Iterator[Check]:
    support, needs = job.objective.support, job.objective.needs
    if needs.hidden and (len(job.teacher) > 1 or not job.teacher[0].means.hidden):
        detail = (
            f"objective.support: {support} needs one teacher, with back end torch: its hidden states go to the learner, which has its head"
        )
        yield Check("teacher support", "fail", detail, "name a single such teacher, or set it to sampled, student or teacher", exit_code=2)
    reward, samples = job.objective.reward, job.rollout.samples_per_prompt
    if reward is not None and reward.baseline == "group" and samples < 2:
        detail = f"objective.reward.baseline: group compares the samples of a prompt, and rollout.samples_per_prompt is {samples}"
        yield Check("reward", "fail", detail, "set it to 2 or more, or baseline to running", exit_code=2)
    if samples < 2 and any(teacher.demonstration for teacher in job.teacher):
        detail = f"teacher.demonstration: it is another answer to the same prompt, and rollout.samples_per_prompt is {samples}"
        yield Check("demonstration", "fail", detail, "set it to 2 or more, or remove the demonstration", exit_code=2)
    if len({teacher.demonstration for teacher in job.teacher}) > 1:
        yield Check("demonstration", "fail", "teacher.demonstration: differs between teachers", "set it alike for all", exit_code=2)
    if job.learner.compile and not any(map(shutil.which, COMPILERS)):
        detail = f"learner.compile: true, and none of {', '.join(COMPILERS)} is on this machine"
        yield Check("compiler", "warn", detail, "install one where the learner runs (apt-get install g++), or set it to false")
    for teacher in job.teacher:
        if not teacher.means.local and not teacher.url:
            detail = f"teacher {teacher.name}: backend {teacher.backend} needs a url"
            yield Check("teacher support", "fail", detail, "add url to the teacher", exit_code=2)
        if not teacher.means.given_ids and needs.student_top_k:
            detail = f"objective.support {support} asks teacher {teacher.name}'s server for any id's log-prob"
            yield Check("teacher support", "warn", detail, "start the server with --max-logprobs -1, or set it to sampled or teacher")
    for package in {teacher.means.package for teacher in job.teacher} - {None}:
        if package and importlib.util.find_spec(package) is None:
            yield Check(package, "fail", f"teacher.backend: {package} is not installed", "install the cpu or gpu extra, or set it to torch")


def check_dtypes(job: Job) -> Iterator[Check]:
    rollout, learner = job.rollout.dtype, job.learner.dtype
    remedy = ""
    if rollout != learner:
        detail, remedy = f"rollout.dtype {rollout} and learner.dtype {learner} differ", "set both alike, or expect a larger sync gap"
    elif torch.cuda.is_available() and rollout == "float32":
        detail, remedy = "float32 on a GPU", "bfloat16 is several times faster there"
    elif not torch.cuda.is_available() and rollout == "bfloat16" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        detail, remedy = "bfloat16 on a CPU without bf16 instructions", "float32 is faster there"
    else:
        detail = rollout
    yield Check("dtype", "warn" if remedy else "pass", detail, remedy)


def check_repeatable(job: Job) -> Iterator[Check]:
    """A strict job resumes bit for bit; what stands against that is said once, here."""
    if not job.strict:
        return
    against = [f"teacher {teacher.name} is a server, whose batches are its own" for teacher in job.teacher if not teacher.means.repeatable]
    if job.service.prometheus_url and job.governor.mode != "off":
        against.append("the governor reads a Prometheus server, whose scrapes fall when they fall")
    if against:
        detail = f"rollout.max_staleness 0, but a resumed run may differ: {'; '.join(against)}"
        yield Check("exact resume", "warn", detail, "use a local teacher and the run's own /metrics where bits matter")
    else:
        yield Check("exact resume", "pass", "strict: the same job gives the same weights, resumed or not")
