"""What crosses between the driver and its actors many times a step, as bytes.

Ray's own serialiser asks Python about every object in a message, and reads a streamed value twice; bytes it passes on as they are.
At 500 rollout actors that is half of the driver's work (tests/bench/driver_cost.py).
"""

import pickle
from typing import Any


def pack(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpack(message: bytes) -> Any:
    """Only for what an actor of the same run packed: unpickling runs code."""
    return pickle.loads(message)
