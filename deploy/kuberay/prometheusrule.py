"""PrometheusRule objects of the Prometheus operator, made from the rules that every other Prometheus loads.

python deploy/kuberay/prometheusrule.py     # writes prometheusrule.yaml beside itself; a test holds the two together
"""

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus"
HEAD = """\
# Made by prometheusrule.py from deploy/prometheus/{rules,alerts}.yml: change those. The operator's Prometheus must select these
# objects (ruleSelector).
"""
OBJECT = """\
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: opd-{name}
spec:
"""


def objects() -> str:
    """The text of prometheusrule.yaml: an object per file, whose groups stand under `spec` as they stand in the file."""
    text = HEAD
    for name in ("rules", "alerts"):
        lines = (RULES / f"{name}.yml").read_text().splitlines(keepends=True)
        text += OBJECT.format(name=name) + "".join(f"  {line}" if line.strip() else line for line in lines)
    return text


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(objects())
