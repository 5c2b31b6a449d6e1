"""What a rollout actor does around its engine, with an engine that needs no vLLM."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.rollout.actor import RolloutActor
from actors.rollout.settings import RolloutSettings

SHARED = Path("/dev/shm")


class ReadingEngine:
    """Reads the weights as an engine does: in another process, by their path."""

    def __init__(self) -> None:
        self.read, self.path, self.files_meanwhile = b"", "", set[Path]()
        self.version = -1

    async def load_file(self, path: str, weight_version: int) -> None:
        self.path, self.version = path, weight_version
        self.files_meanwhile = set(SHARED.iterdir())
        reader = "import pathlib, sys; sys.stdout.buffer.write(pathlib.Path(sys.argv[1]).read_bytes())"
        self.read = subprocess.run([sys.executable, "-c", reader, self.path], capture_output=True, check=True).stdout

    async def probe(self, token_ids: list[int]) -> np.ndarray:
        return np.array(token_ids, np.float32)


async def test_weights_on_their_way_to_the_engine_leave_no_file_behind_an_actor_that_is_killed() -> None:
    terms: dict[str, Any] = {"stop_ids": (1,), "reference_tokens": None, "weight_transfer": "file", "seed": 0}
    actor, engine = RolloutActor("none", RolloutSettings(), **terms), ReadingEngine()
    actor._engine = engine  # type: ignore[assignment]
    weights = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    before = set(SHARED.iterdir())
    probed = await actor.load_weights(weights, 3, [5, 9])
    assert probed.tolist() == [5, 9]
    assert (engine.read, engine.version) == (weights.tobytes(), 3)
    assert not {path for path in engine.files_meanwhile - before if path.name.startswith("opd")}
    assert not Path(engine.path).exists(), "the memory is given back when the engine has it"
