"""POLICY.yaml of `opd govern`: the governor's policy, the trainers' cap, and what to scrape."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.settings import Settings, Url
from opd_governor.services.sidecar.seen import NUMBERS

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
"""What a run may be called: it is a folder's name too."""


class ScrapeSettings(Settings):
    """A trainer's own /metrics, read in place of posted steps."""

    run: Annotated[str, Field(pattern=RUN_NAME)]
    """The run these figures belong to."""
    url: Url
    """Address of the metrics in Prometheus text format."""
    every_s: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    """How often it is read, seconds. A reading whose step has not moved is no step."""
    step: str
    """Name of the gauge or counter that holds the trainer's step."""
    names: dict[str, str]
    """Field of a step -> name of a gauge. `length_tokens` names a histogram (of it the mean and p95 since the last reading are taken),
    `finished` a counter with the label `finished_reason` or `finish_reason` (the share of `length` is the truncation)."""


class PolicyFile(Settings):
    """The whole file. `{}` is the default policy."""

    governor: Policy = Policy()
    """As in a job file: aims, bounds and what may be moved."""
    cap_tokens: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """The trainers' own cap, tokens: what holds without pressure. None: the cap that each trainer posts."""
    scrape: tuple[ScrapeSettings, ...] = ()
    """Trainers that are read instead of posting."""
    step_answers: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """With --proxy: answers that make a step as long as no weight update has passed."""
    max_runs: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """Runs kept at most; a post for one more is refused."""


SCRAPED = frozenset({*NUMBERS, "length_tokens", "finished"})


class PolicyFileError(ValueError):
    """A policy file that cannot be used: one line for each mistake."""


def load_policy_file(path: Path) -> PolicyFile:
    """Raises PolicyFileError."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise PolicyFileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PolicyFileError(f"{path}: is no text") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise PolicyFileError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from None
    try:
        policy = PolicyFile.model_validate(document or {})
    except ValidationError as error:
        raise PolicyFileError("\n".join(f"{path}: {line}" for line in _lines(error))) from None
    for index, scrape in enumerate(policy.scrape):
        if unknown := sorted(scrape.names.keys() - SCRAPED):
            raise PolicyFileError(f"{path}: scrape.{index}.names.{unknown[0]}: no such field; known: {', '.join(sorted(SCRAPED))}")
    return policy


class OutsideSettings(Settings):
    """What may be tuned in a run of another trainer while it goes on."""

    cap_tokens: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """The trainer's own cap, tokens: what holds without pressure, and the most the governor ever asks for. None: the cap it posts."""
    governor: Policy = Policy()


def _lines(error: ValidationError) -> list[str]:
    """One line per mistake: path of the field, what is wrong with it, the value given."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(file)"
        if item["type"] == "extra_forbidden":
            known = list(PolicyFile.model_fields) if len(item["loc"]) == 1 else list(Policy.model_fields)
            near = get_close_matches(str(item["loc"][-1]), known, n=1)
            lines.append(f"{where}: unknown key; " + (f"did you mean {near[0]}?" if near else "remove it"))
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')} (got {str(item['input'])[:60]!r})")
    return lines
