"""Step time as responses and rollout actors grow, with the fitted exponent of each.

    python -m tests.bench.speed.scaling                  # both, scaling.json and scaling.png beside this file (about 6 minutes)
    python -m tests.bench.speed.scaling --only caps

    caps      quickstart models on the real stack, every response exactly the cap long (no stop is sampled before it), 16 prompts
              a step: seconds of a whole step at 64, 128, 256, 512 tokens
    actors    the same at 64 tokens with 1, 2 rollout actors on the real stack; and from driver_cost.json up to 1000 timed fakes.
              The work grows with the actors: 16 prompts a step and actor
The exponent is the slope of the least-squares line through the logarithms: 1 is linear.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.speed.bench import machine, run_job

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CAPS = (64, 128, 256, 512)
ACTORS = (1, 2)
PROMPTS, STEPS = 16, 27
CONTEXT_TOKENS = 640
JOB = "deploy/jobs/sums.yaml"


def exponent(numbers: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(numbers), np.log(seconds), 1)[0])


def models(folder: Path) -> tuple[str, ...]:
    """The quickstart's models with a context window that the longest cap fits: rotary positions have no table to outgrow."""
    for name in ("student", "teacher"):
        shutil.copytree(ROOT / "deploy/sums" / name, folder / name)
        config = folder / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT_TOKENS}))
    return f"student.model={folder / 'student'}", f"teacher.model={folder / 'teacher'}"


def point(folder: Path, cap_tokens: int, num_actors: int) -> dict[str, Any]:
    settings = (
        *models(folder / f"{cap_tokens}-{num_actors}"),
        f"rollout.max_new_tokens={cap_tokens}",
        f"rollout.min_tokens={cap_tokens}",
        f"rollout.num_actors={num_actors}",
        f"rollout.prompts_per_step={PROMPTS * num_actors}",
    )
    records = run_job(JOB, STEPS, settings).records
    assert all(set(record["lengths"]) == {cap_tokens} for record in records), "a response ended before the cap"
    phases = {name: statistics.median(record[name] for record in records) for name in ("rollout_s", "learn_s", "sync_s")}
    seconds = [record["seconds"] for record in records]  # in pairs where two batches end together: the mean tells, not the median
    found = {"cap_tokens": cap_tokens, "num_actors": num_actors, "step_s": statistics.mean(seconds), "steps_s": seconds} | phases
    print(f"cap {cap_tokens:4d}, actors {num_actors}: step {found['step_s']:.3f} s, rollout {phases['rollout_s']:.3f}", flush=True)
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (caps, actors) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in ("step_s", "rollout_s", "learn_s"):
        numbers, seconds = [p["cap_tokens"] for p in results["caps"]], [p[name] for p in results["caps"]]
        caps.loglog(numbers, seconds, marker="o", label=f"{name[:-2]}: exponent {exponent(numbers, seconds):.2f}")
    caps.set(xlabel="tokens of every response", ylabel="seconds", title="step time, 16 responses")
    for name, points, marker in (("real engines, 2 cores", results["actors"], "s"), ("timed fakes over Ray", results["fakes"], "o")):
        if points:
            numbers, seconds = [p["num_actors"] for p in points], [p["step_s"] for p in points]
            actors.loglog(numbers, seconds, marker=marker, label=f"{name}: exponent {exponent(numbers, seconds):.2f}")
    actors.set(xlabel="rollout actors, work growing with them", ylabel="seconds a step", title="step time, 16 responses an actor")
    for axes in (caps, actors):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def fakes() -> list[dict[str, Any]]:
    """Seconds a step from the driver's benchmark: 16 trajectories a step and actor there too."""
    path = HERE.parent / "driver_cost.json"
    points = json.loads(path.read_text())["ray"] if path.exists() else []
    return [{"num_actors": p["num_actors"], "step_s": 16 * p["num_actors"] / p["trajectories_per_s"]} for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("caps", "actors"), nargs="*", default=("caps", "actors"))
    options = parser.parse_args()
    path = HERE / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="opd-scaling-") as folder:
        if "caps" in options.only:
            results["caps"] = [point(Path(folder), cap_tokens, 1) for cap_tokens in CAPS]
        if "actors" in options.only:
            results["actors"] = [point(Path(folder) / "actors", CAPS[0], num_actors) for num_actors in ACTORS]
    results["fakes"], results["machine"] = fakes(), machine()
    for name, key in (("caps", "cap_tokens"), ("actors", "num_actors"), ("fakes", "num_actors")):
        if len(results.get(name, ())) > 1:
            results[f"{name}_exponent"] = exponent([p[key] for p in results[name]], [p["step_s"] for p in results[name]])
            print(f"{name}: exponent {results[f'{name}_exponent']:.2f}")
    path.write_text(json.dumps(results, indent=1) + "\n")
    if {"caps", "actors"} <= results.keys():
        draw(results, HERE / "scaling.png")


if __name__ == "__main__":
    main()
