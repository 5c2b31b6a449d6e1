"""The job file's reference, README.md beside this file, from the settings classes.

    Job --pydantic's JSON schema--> one table per group of keys --> README.md

`python -m opd_governor.services.job.reference` writes the page, and `make docs` calls it; a test holds the page against this program.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema

from opd_governor.services.job.settings import PRESETS, Job
from opd_governor.services.job.tunables import Tunables

PAGE = Path(__file__).parent / "README.md"
Schema = dict[str, Any]

INTRODUCTION = """\
# The job file

This page is made from the settings classes by `make docs`. Change a docstring there, not a line here.

A job is one YAML file. `opd init` writes one, `opd check JOB.yaml` looks for mistakes in it, and `opd run JOB.yaml --set group.key=value`
overrides a key for one run. Unknown keys and values out of range are errors that name the key, the value and what is allowed.
Relative paths start at the job file's folder.

A key with a † can change while the run goes on: `opd tune RUN group.key=value`, the live page, or `PATCH /v1/config`. A change takes
effect at the next step.

`preset` fills `objective` and `governor`; keys in the file win:
"""


class _WithFactories(GenerateJsonSchema):
    """Pydantic's JSON schema, with the defaults that a factory makes."""

    def get_default_value(self, schema: Any) -> Any:
        factory = schema.get("default_factory")
        return factory() if factory and not schema.get("default_factory_takes_data") else super().get_default_value(schema)


def render() -> str:
    """The whole page."""
    schema = Job.model_json_schema(schema_generator=_WithFactories)
    presets = ["", "| preset | fills |", "|---|---|"]
    for name, groups in PRESETS.items():
        filled = (f"`{group}.{key}: {_plain(value)}`" for group, values in groups.items() for key, value in values.items())
        presets.append(f"| `{name}` | {', '.join(filled)} |")
    blocks = [INTRODUCTION.rstrip(), *presets, "", *_group(schema, schema, ()), *_groups(schema, schema, ())]
    return "\n".join(blocks).rstrip() + "\n"


def _groups(root: Schema, parent: Schema, path: tuple[str, ...]) -> Iterator[str]:
    """The groups below a schema, each before the groups inside it."""
    for key, field in parent["properties"].items():
        group = _group_of(root, field)
        if group is not None:
            yield from _group(root, group, (*path, key))
            yield from _groups(root, group, (*path, key))


def _group(root: Schema, group: Schema, path: tuple[str, ...]) -> Iterator[str]:
    """Heading, docstring and table of the keys that are no groups themselves."""
    yield f"## {'.'.join(path) or 'top level'}"
    yield ""
    yield " ".join(group.get("description", "").split())
    required = group.get("required", [])
    rows = [(key, field) for key, field in group["properties"].items() if _group_of(root, field) is None]
    if rows:
        yield from ("", "| key | takes | default | meaning |", "|---|---|---|---|")
    for key, field in rows:
        tunable = " †" if _is_tunable((*path, key)) else ""
        default = "required" if key in required else f"`{_plain(field.get('default'))}`"
        yield f"| `{key}`{tunable} | {_type(field)} | {default} | {_cell(field.get('description', ''))} |"
    yield ""


def _group_of(root: Schema, field: Schema) -> Schema | None:
    """The schema of a key that holds a group, or a list of groups; None for a plain value."""
    items = field.get("items")
    inner = items if isinstance(items, dict) and "$ref" in items else field
    for option in (inner, *inner.get("anyOf", ()), *inner.get("allOf", ())):
        if "$ref" in option:
            definition: Schema = root["$defs"][option["$ref"].rpartition("/")[2]]
            if "properties" in definition:
                return definition
    return None


def _is_tunable(path: tuple[str, ...]) -> bool:
    fields: Any = Tunables.model_fields
    for part in path:
        if part not in fields:
            return False
        fields = getattr(fields[part].annotation, "model_fields", {})
    return True


def _type(field: Schema) -> str:
    """What a key takes: `integer, 1 to 8`, `one of a, b`, `list of text`, `number above 0, or null`."""
    if "anyOf" in field:
        return ", or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type", "any")
    if kind == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0])}"
        return f"list of {_type(field.get('items', {}))}"
    if kind == "string" and "pattern" in field:
        choice = re.fullmatch(r"\^\(([\w|]+)\)\$", field["pattern"])
        return _type({"enum": choice[1].split("|")}) if choice else f"text like `{_cell(field['pattern'])}`"
    names = {"string": "text", "boolean": "true or false", "null": "null", "object": "keys and values"}
    return f"{names.get(kind, kind)}{_range(field)}"


def _range(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {low} to {high}"
    words = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    said = " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)
    return f" {said}" if said else ""


def _plain(value: Any) -> str:
    """A value as it stands in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    """A docstring as one cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(render())
