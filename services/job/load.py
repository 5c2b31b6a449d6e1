"""From a job file to a validated job: reading, overrides, extensions, messages, relative paths."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from opd_governor.actors.extensions import ExtensionError, use_extensions
from opd_governor.actors.settings import Settings
from opd_governor.services.job.settings import Job, JobError

LONGEST_SHOWN = 200
"""Characters of a wrong value that a message repeats."""


def load_job(path: Path, overrides: tuple[str, ...] = ()) -> Job:
    """Read, override and validate a job file.

    Relative paths in it are resolved against the file's own folder where they exist there.
    `overrides` are `key.path=value` with YAML values. Raises JobError, one line per mistake.
    """
    try:
        tree = _OnceLoader(path.read_text()).get_single_data()
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}; give the path of a job file such as deploy/jobs/sums.yaml") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise JobError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise JobError(f"{path}: nested without end; mend it") from None
    if not isinstance(tree, dict):
        raise JobError(f"{path}: expected keys and values at the top, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    try:
        use_extensions_of(tree, path.resolve().parent)
    except ExtensionError as error:
        raise JobError(f"{path}: {error}") from None
    try:
        job = Job.model_validate(tree)
    except ValidationError as error:
        raise JobError("\n".join(f"{path}: {line}" for line in describe_errors(error))) from None
    return _resolve_paths(job, path.resolve().parent)


class _OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two the last would count, without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} stands there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def use_extensions_of(tree: dict[str, Any], base: Path) -> None:
    """Import what a job's `extensions` name, with .py files resolved against `base`. Raises ExtensionError.

    The paths are written back into the tree, so that a run's job.yaml names them for good. A malformed list is left to validation.
    """
    named = tree.get("extensions") or []
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        tree["extensions"] = [str((base / name).resolve()) if name.endswith(".py") else name for name in named]
        use_extensions(tree["extensions"])


def describe_errors(error: ValidationError, root: type[Settings] | None = None) -> list[str]:
    """One line per mistake: path of the field, what is wrong with it, the value given. `root`: what was validated; None: a job."""
    root = root or Job
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(job)"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; {_meant(item['loc'], root)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; add it")
        elif item["type"] == "secret":
            lines.append(f"{where}: {item['msg']}")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            given = repr(item["input"])
            lines.append(f"{where}: {message} (got {given if len(given) <= LONGEST_SHOWN else given[:LONGEST_SHOWN] + '...'})")
    return lines


def _meant(place: tuple[int | str, ...], root: type[Settings]) -> str:
    """What to do about an unknown key: the nearest known one beside it, else all of them."""
    group: Any = root
    for part in place[:-1]:
        fields = getattr(group, "model_fields", {})
        if isinstance(part, str) and part in fields:
            group = _settings_in(fields[part].annotation)
    known = list(getattr(group, "model_fields", {}))
    near = get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {near[0]}?" if near else f"remove it; the keys here are {', '.join(known)}" if known else "remove it"


def _settings_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `tuple[TeacherSettings, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := _settings_in(part)) is not None), None)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise JobError(f"--set {override}: expected key.path=value, such as learner.total_steps=10")
    *parents, leaf = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise JobError(f"--set {override}: {part} has no keys below it")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if not isinstance(node, dict):
        raise JobError(f"--set {override}: {'.'.join(parents)} is a {type(node).__name__}, it has no key {leaf}")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"--set {override}: the value is not YAML ({getattr(error, 'problem', None) or error}); quote it") from None


def _resolve_paths(job: Job, base: Path) -> Job:
    """Relative paths that exist beside the job file become absolute; ids of models and datasets stay as they are."""

    def resolve(value: str | None) -> str | None:
        if value and (base / value).exists():
            return str((base / value).resolve())
        is_glob = value and "://" not in value and not Path(value).is_absolute() and any(sign in value for sign in "*?[")
        return str(base / value) if is_glob and next(base.glob(value), None) else value  # type: ignore[operator, arg-type]

    def resolve_verifier(spec: str) -> str:
        file, separator, function = spec.partition(":")
        return f"{resolve(file)}:{function}" if separator and file.endswith(".py") else spec

    data = job.data.model_copy(
        update={
            "prompts": job.data.prompts.model_copy(update={"path": resolve(job.data.prompts.path)}),
            "eval": job.data.eval.model_copy(
                update={"path": resolve(job.data.eval.path), "verifier": resolve_verifier(job.data.eval.verifier)}
            ),
        }
    )
    lora, reward, environment = job.student.lora, job.objective.reward, job.environment
    if lora is not None:
        lora = lora.model_copy(update={"start_from": resolve(lora.start_from)})
    if reward is not None:
        reward = reward.model_copy(update={"verifier": resolve_verifier(reward.verifier)})
    if environment is not None:
        entry = environment.entry and resolve_verifier(environment.entry)
        environment = environment.model_copy(update={"entry": entry, "tools": tuple(map(resolve_verifier, environment.tools))})
    return job.model_copy(
        update={
            "environment": environment,
            "objective": job.objective.model_copy(update={"reward": reward}),
            "student": job.student.model_copy(
                update={"model": resolve(job.student.model), "tokenizer": resolve(job.student.tokenizer), "lora": lora}
            ),
            "teacher": tuple(t.model_copy(update={"model": resolve(t.model), "tokenizer": resolve(t.tokenizer)}) for t in job.teacher),
            "data": data,
        }
    )
