"""What the engine asks of vLLM; nothing is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_governor.actors.rollout.settings import RolloutSettings
from tests.tiny import build_tiny

pytestmark = pytest.mark.integration
"""For the import of vllm, which takes many seconds."""


def test_on_a_cpu_no_prompt_is_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk takes back the draw of a seeded request, which vLLM cannot do on a CPU: the engine died in a weight update under load."""
    import opd_governor.actors.rollout.engine as module

    if not module.current_platform.is_cpu():
        pytest.skip("about CPUs")
    configs = []

    def from_engine_args(arguments: Any) -> Any:
        configs.append(arguments.create_engine_config())
        return SimpleNamespace(model_config=configs[-1].model_config)

    monkeypatch.setattr(module, "AsyncLLM", SimpleNamespace(from_engine_args=from_engine_args))
    module.Engine(str(build_tiny(tmp_path / "student", seed=1)), RolloutSettings(), weight_transfer="file")
    (scheduler,) = [config.scheduler_config for config in configs]
    assert scheduler.enable_chunked_prefill is False
    assert scheduler.max_num_batched_tokens >= configs[0].model_config.max_model_len, "a whole prompt has to fit"
