"""How much each teacher counts on a row: column `teacher_weights`. Pure."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from opd_governor.services.inputs.refusals import RowError

COLUMN = "teacher_weights"
"""Teacher's name -> weight in the blend on this row, in place of `teacher.weight`; 0: it is not asked. As an object, or as JSON text."""


def teacher_weights(row: Mapping[str, Any], serving: Collection[str]) -> dict[str, float]:
    """Raises RowError for a name that no teacher of the row's domain has, a weight that is none, or none above 0."""
    value = row.get(COLUMN)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f'column {COLUMN!r} must be an object such as {{"maths": 2}}, got {value!r}') from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f'column {COLUMN!r} must be an object such as {{"maths": 2}}, got {type(value).__name__}')
    given = {str(name): weight for name, weight in value.items() if weight is not None}  # a table's struct has every name
    for name, weight in given.items():
        if name not in serving:
            raise RowError(f"column {COLUMN!r} names {name!r}; the teachers of the row's domain are {', '.join(serving) or 'none'}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise RowError(f"column {COLUMN!r}: the weight of {name!r} must be a number of at least 0, got {weight!r}")
    if given and len(given) == len(serving) and not any(given.values()):
        raise RowError(f"column {COLUMN!r} leaves no teacher: give one a weight above 0")
    return {name: float(weight) for name, weight in given.items()}
