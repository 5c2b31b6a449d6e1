"""What a run keeps in memory for its page."""

import tracemalloc

from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.record.monitor import RunMonitor

NUM_STEPS = 500


def test_a_step_costs_little_memory_and_nothing_for_its_rollouts() -> None:
    def record(step: int) -> dict[str, object]:
        rollouts = {"lengths": list(range(4096)), "prompts": [[0, index] for index in range(4096)]}
        return {"step": step} | {f"field_{i}": step / (i + 1) for i in range(100)} | rollouts

    monitor = RunMonitor("x", NUM_STEPS, LengthLimits(8))
    tracemalloc.start()
    for step in range(1, NUM_STEPS + 1):
        monitor.add_step(record(step))
    kib_per_step = tracemalloc.get_traced_memory()[0] / NUM_STEPS / 1024
    tracemalloc.stop()
    assert kib_per_step < 6, "as Python objects it would be 9, with prompts hundreds"
    (newest,) = monitor.steps(after=NUM_STEPS - 1)
    assert newest == {key: value for key, value in record(NUM_STEPS).items() if key not in ("lengths", "prompts")}
