"""What the engine asks of vLLM; nothing is started."""

from collections import deque
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


def test_engines_of_a_lora_student_have_its_base_and_room_for_every_version_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import opd_governor.actors.rollout.engine as module
    from opd_governor.actors.rollout.arguments import lora_arguments

    configs = []

    def from_engine_args(arguments: Any) -> Any:
        configs.append(arguments.create_engine_config())
        return SimpleNamespace(model_config=configs[-1].model_config)

    monkeypatch.setattr(module, "AsyncLLM", SimpleNamespace(from_engine_args=from_engine_args))
    settings = RolloutSettings().model_copy(update={"engine": lora_arguments(12, ("q_proj", "up_proj"), 2)})
    module.Engine(str(build_tiny(tmp_path / "student", "gemma3", seed=1)), settings, weight_transfer="file")
    (config,) = configs
    assert (config.lora_config.max_lora_rank, config.lora_config.max_loras, config.lora_config.max_cpu_loras) == (16, 4, 4)
    assert config.lora_config.target_modules == ["q_proj", "up_proj"]
    assert config.load_config.load_format == "safetensors"
    assert config.model_config.hf_text_config.tie_word_embeddings is True, "the base is never loaded again: its head may stay tied"


async def test_each_version_of_an_adapter_has_a_name_an_id_and_a_folder_and_old_ones_go(tmp_path: Path) -> None:
    """Through the actor, from the learner's bytes: what vLLM is given, and what is left on the disk."""
    import numpy as np
    import torch

    from opd_governor.actors.learner.lora import adapter_bytes, read_adapter
    from opd_governor.actors.learner.settings import LoraSettings
    from opd_governor.actors.rollout.actor import RolloutActor
    from opd_governor.actors.rollout.arguments import lora_arguments
    from opd_governor.actors.rollout.engine import Engine

    class Llm:
        added: list[Any]
        removed: list[int]

        async def add_lora(self, request: Any) -> None:
            assert read_adapter(Path(request.lora_path), lora).keys() == tensors.keys()
            self.added.append(request)

        async def remove_lora(self, number: int) -> None:
            self.removed.append(number)

    lora = LoraSettings(rank=4)
    settings = RolloutSettings().model_copy(update={"engine": lora_arguments(4, ("q_proj",), 1)})
    actor = RolloutActor("none", settings, stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0)
    engine, llm = object.__new__(Engine), Llm()
    llm.added, llm.removed = [], []
    engine._llm, engine._num_updates, engine._num_kept, engine.weight_version = llm, 0, 3, -1  # type: ignore[assignment]
    engine._adapters = deque()

    async def probe(ids: list[int], *, base: bool = False) -> Any:
        assert not base or engine.weight_version == -1, "the base is asked before any adapter is there"
        return np.full(len(ids) - 1, float(engine.weight_version + 1))

    engine.probe, actor._engine = probe, engine  # type: ignore[method-assign]
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    for version in range(5):
        tensors = {names[0]: torch.randn(4, 8), names[1]: torch.full((8, 4), float(version))}
        data = np.frombuffer(adapter_bytes(tensors, lora), np.uint8)
        assert (await actor.load_weights(data, version, [5, 6, 7])).tolist() == [[version + 1.0] * 2, [0.0] * 2]
        assert engine.weight_version == version
    assert len({r.lora_name for r in llm.added}) == len({r.lora_int_id for r in llm.added}) == len({r.lora_path for r in llm.added}) == 5
    assert llm.removed == [r.lora_int_id for r in llm.added[:2]]
    assert [Path(r.lora_path).is_dir() for r in llm.added] == [False, False, True, True, True]
    with pytest.raises(ValueError, match="give each version a folder of its own"):
        await engine.load_adapter(llm.added[-1].lora_path, 5)
