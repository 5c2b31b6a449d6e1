"""Names of series as Prometheus stores them, and the names an expression asks for."""

import promql_parser
from promql_parser import MatrixSelector, VectorSelector

from opd_governor.services.record.telemetry import declared

SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
DECLARED_SERIES = {metric.name + suffix for metric in declared() for suffix in SUFFIXES[metric.kind]}

VARIABLES = {"$__rate_interval": "10s", "$run": ".*"}
"""Grafana's variables, and the values used where there is no Grafana."""


def substituted(expression: str) -> str:
    """A dashboard's expression as Prometheus would get it. A variable that is left is an error."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def names_in(expression: str) -> set[str]:
    """Names of all series that a PromQL expression selects."""
    found: set[str] = set()

    def collect(node: object) -> None:
        selector = node.vector_selector if isinstance(node, MatrixSelector) else node
        if isinstance(selector, VectorSelector):
            named = selector.name or next(m.value for m in selector.matchers.matchers if m.name == "__name__")
            found.add(named.replace("[:_]", ":"))

    promql_parser.walk(promql_parser.parse(expression), collect)
    return found
