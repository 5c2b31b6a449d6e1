"""Every sync brings the learner's weights into the engine: four architectures, tied and untied, twenty syncs each."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import Architecture, build_tiny
from transformers import AutoModelForCausalLM

from actors.rollout.settings import RolloutSettings

pytestmark = pytest.mark.integration

NUM_SYNCS = 20
TOLERANCE_NATS = 1e-3


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen3", None), ("gemma3", None), ("gpt2", None)])
def test_engine_and_learner_agree_after_each_of_twenty_syncs(tmp_path: Path, architecture: Architecture, tied: bool | None) -> None:
    asyncio.run(_sync_and_compare(tmp_path, architecture, tied))


async def _sync_and_compare(tmp_path: Path, architecture: Architecture, tied: bool | None) -> None:
    from actors.rollout.engine import Engine, update_from_file

    folder = build_tiny(tmp_path / "student", architecture, seed=0, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(str(folder), RolloutSettings(max_num_seqs=8), weight_transfer="file")
    probe = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]
    file = tmp_path / "weights.safetensors"
    gaps, versions = [], []
    try:
        for version in range(NUM_SYNCS):
            torch.manual_seed(version)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            tensors = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
            tensors["lm_head.weight"] = model.get_output_embeddings().weight.detach().clone()
            file.write_bytes(save(tensors))
            await update_from_file(engine, file, version)
            with torch.no_grad():
                expected = model(torch.tensor([probe])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(probe[1:])[:, None])[:, 0]
            gaps.append(float(np.abs(await engine.probe(probe) - expected.numpy()).max()))
            versions.append(engine.weight_version)
    finally:
        engine.shutdown()
    assert versions == list(range(NUM_SYNCS))
    assert max(gaps) < TOLERANCE_NATS, gaps
