"""Parts of a stranger's: one file for each kind, as CONTRIBUTING.md shows, and a job that names them all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_governor.actors import extensions

FILES = {
    "loss.py": """
from opd_governor.actors.learner.divergences import LOSSES

@LOSSES.add("total_variation")
def total_variation(logp_CX, logq_CX, p_CX, settings):
    return (logp_CX.exp() - logq_CX.exp()).abs().sum(-1) / 2
""",
    "support.py": """
from opd_governor.actors.learner.supports import SUPPORTS, Support, listed

SUPPORTS.add("teacher_two")(Support(lambda at, settings: listed(at, columns=2), teacher_ids=True))
""",
    "signal.py": """
import math
from opd_governor.actors.governor.evidence import MeanTest, Observation
from opd_governor.actors.governor.signals import SIGNALS, Signal

def read(growth):
    entropy_nats = growth.current.gauge("opd_student_entropy_nats")
    return None if entropy_nats is None else Observation(math.log(entropy_nats), num=1)

SIGNALS.add("entropy")(
    Signal(
        title="entropy under its running level",
        unit="nats",
        help="Far below its own level, the student repeats itself.",
        disease="drift",
        test=MeanTest(sign=-1.0, slack=math.log(2), half_life_steps=25.0),
        read=read,
        alone=0.5,
    )
)
""",
    "actuator.py": """
from opd_governor.actors.governor.actuators import ACTUATORS, Actuator

ACTUATORS.add("entropy_weight")(
    Actuator(
        title="entropy weight", unit="", help="Weight of the student's entropy in the loss.", tighter="up", bound=0.1, moved_by=("drift",)
    )
)
""",
    "verifier.py": """
from opd_governor.services.inputs.verifiers import VERIFIERS

@VERIFIERS.add("contains")
def contains(response, answer):
    return answer in response
""",
    "backend.py": """
from opd_governor.actors.teacher.backends import TEACHER_BACKENDS, Backend

def load(settings, stop_ids, seed):
    from opd_governor.actors.teacher.scorers import TorchScorer
    return TorchScorer(settings, stop_ids)

TEACHER_BACKENDS.add("own_torch")(Backend(load, beams=True))
""",
    "tracker.py": """
from opd_governor.services.job.trackers import TRACKERS

@TRACKERS.add("lines")
class Lines:
    package = "json"

    def __init__(self, module, job, run_dir):
        self._json, self._file = module, open(run_dir / "lines.txt", "w")

    def log(self, values, step):
        self._file.write(self._json.dumps([step, values]) + "\\n")

    def close(self):
        self._file.close()
""",
    "reader.py": """
import yaml
from opd_governor.services.inputs.readers import READERS

@READERS.add(".yaml")
def read_yaml(file):
    yield from enumerate(yaml.safe_load_all(file), start=1)
""",
}
"""File name -> a part."""
NAMES = {
    "objective.loss": "total_variation",
    "objective.support": "teacher_two",
    "teacher.0.backend": "own_torch",
    "service.trackers.0": "lines",
    "governor.actuators.0": "entropy_weight",
}
"""Key of the job -> the part it names. A signal needs no key, a reader goes by the file's name, a verifier is found by `load_verifier`."""
JOB = f"""
name: stranger
extensions: [{", ".join(FILES)}]
student: {{model: student}}
teacher: {{model: teacher, backend: own_torch}}
data:
  prompts: {{path: prompts.yaml}}
  eval: {{path: prompts.yaml, verifier: contains}}
objective: {{loss: total_variation, support: teacher_two, top_k: 8}}
governor: {{actuators: [entropy_weight], bounds: {{entropy_weight: 0.2}}}}
service: {{trackers: [lines]}}
"""
PROMPTS = "{prompt: 1 + 1, answer: '2'}\n---\n{prompt: 2 + 2, answer: '4'}\n"


def write_parts(folder: Path) -> Path:
    """The files, a job that names them and its prompts; the job file's path."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "prompts.yaml").write_text(PROMPTS)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


@contextmanager
def own_parts() -> Iterator[None]:
    """What is added within it is taken back at its end: other tests see the parts of the package alone."""
    num, loaded = len(extensions._added), set(extensions._loaded)
    try:
        yield
    finally:
        extensions._take_back(num)
        extensions._loaded.intersection_update(loaded)
