"""On-policy distillation on Ray with a closed loop on length.

The losses are a library of their own, which needs torch, numpy and pydantic, and loads neither Ray nor vLLM:

    from opd_governor import reverse_kl, sampled_reverse_kl, top_k_divergence
"""

import importlib
from typing import Any

_LIBRARY = (
    "divergence",
    "forward_kl",
    "jsd",
    "mixed_kl",
    "reverse_kl",
    "sampled_reverse_kl",
    "skew_kl",
    "top_k_divergence",
)

__all__ = list(_LIBRARY)


def __getattr__(name: str) -> Any:
    if name in _LIBRARY:
        return getattr(importlib.import_module("opd_governor.actors.learner.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])
