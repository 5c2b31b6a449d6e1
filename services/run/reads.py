"""What a run reads and learns by, in digests: kept in every checkpoint, compared when a run goes on from one.

job, sources --what_it_reads--> {"data.prompts": "...", "objective.loss": "reverse_kl", ...}
those of the checkpoint, those of now --changes--> one line for each that differs
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_governor.services.inputs.environments import environment_identity
from opd_governor.services.inputs.models import weights_identity
from opd_governor.services.inputs.table import tokenizer_identity
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.run.sources import Sources

Reads = Mapping[str, Any]
"""Key of the job -> digest, or the value itself for a setting."""
PLAIN = (" demonstration", " follow", " weight")
"""Ends of keys with the settings by which a teacher's scores are made: what it sees of a prompt is in the prompts' own digest."""


def what_it_reads(job: Job, sources: Sources) -> dict[str, Any]:
    """Everything that makes this run this run. A file that only moved gives the same digest."""
    models = sources.models
    reads: dict[str, Any] = {
        "data.prompts": sources.stream.digest(),
        "data.prompts for teachers": sources.stream.digest("teacher_ids"),
        "golden answers of data.prompts": sources.stream.digest("golden_ids"),
        "rollout.stop_token_ids": list(models.stop_ids),
        "student.model": weights_identity(models.student),
        "student.tokenizer": tokenizer_identity(sources.tokenizer),
    }
    if job.environment is not None:
        reads["environment"] = environment_identity(job.environment)
    if job.objective.reward is not None:
        reads["answers of data.prompts"] = sources.stream.digest("answer")
    for settings, model in zip(job.teacher, models.teachers, strict=True):
        reads[f"teacher {settings.name}"] = weights_identity(model) if settings.means.local else f"{settings.url} {model}"
        asked = settings.model_dump(mode="json", include={key.removeprefix(" ") for key in PLAIN})
        reads |= {f"teacher {settings.name} {key}": value for key, value in asked.items()}
    return reads | {f"objective.{key}": value for key, value in job.objective.model_dump(mode="json").items()}


def changes(before: Reads, now: Reads) -> list[str]:
    """One phrase for each thing that is not what it was. Keys that a checkpoint does not know were not there when it was written."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key not in before or before[key] == now.get(key):
            continue
        if key.startswith(("objective.", "rollout.")) or key.endswith(PLAIN):
            found.append(f"{key} (was {before[key]}, is {now[key]})" if key in now else f"{key} (gone)")
        else:
            found.append(f"{key} (other content)" if key in now else f"{key} (gone)")
    return found


def refuse_other_run(checkpoints: Path, now: Reads, *, accept: bool) -> list[str]:
    """Before `--resume`: what differs from the newest checkpoint's run. Raises JobError where something does and is not accepted."""
    found = changes(_newest_reads(checkpoints), now)
    if found and not accept:
        raise JobError(
            f"--resume: the checkpoint's run did not read what this one reads: {'; '.join(found)}; "
            "give what it had, or add --accept-changes to go on as another run"
        )
    return found


def _newest_reads(checkpoints: Path) -> Reads:
    """Of the newest checkpoint whose state can be read; whether it is whole is seen when it is restored."""
    folders = [folder for folder in checkpoints.glob("step-*") if folder.name.removeprefix("step-").isdigit()]
    for folder in sorted(folders, key=lambda folder: -int(folder.name.removeprefix("step-"))):
        try:
            return dict(json.loads((folder / "state.json").read_text()).get("reads", {}))
        except (OSError, ValueError, AttributeError):
            continue
    return {}
