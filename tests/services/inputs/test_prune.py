import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_governor.services.inputs.prune import Stack, heal, measure_kl, prune, prune_model, render, resolve_student, write_answers
from opd_governor.services.job.settings import JobError, PromptSource
from tests.tiny import ARCHITECTURES, build_tiny

PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34], [40]]


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("What is 1+1?", "Hello", "Name three birds")))
    return path


def calibrated(folder):
    stack = Stack(str(folder))
    (texts,) = write_answers(stack, PROMPTS, max_new_tokens=12, stop_ids=[1], seed=0)
    return stack, texts


@torch.no_grad()
def brute_force_kl(folder, kept, texts) -> float:
    """KL over answer tokens of the model and of one that has lost its other layers, whole logits, one text at a time."""
    full, cut = (AutoModelForCausalLM.from_pretrained(folder).double() for _ in range(2))
    owner, name = (cut.transformer, "h") if hasattr(cut, "transformer") else (cut.model, "layers")
    layers = getattr(owner, name)
    if types := getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [types[i] for i in kept]
    setattr(owner, name, torch.nn.ModuleList(layers[i] for i in kept))
    cut.config.num_hidden_layers = len(kept)
    kl = []
    for ids, scored in zip(texts.ids_BT, texts.scored_BT, strict=True):
        end = int(scored.nonzero().max()) + 2
        p, q = (model(ids[None, :end], use_cache=False).logits[0].log_softmax(-1) for model in (full, cut))
        kl.append((p.exp() * (p - q)).sum(-1)[scored[:end]])
    return float(torch.cat(kl).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_search_drops_the_layer_that_changes_the_output_least(tmp_path, architecture):
    folder = build_tiny(tmp_path / "model", architecture, num_layers=4)
    stack, texts = calibrated(folder)
    kept, drops = prune(stack, texts, num_layers=2)

    left = [0, 1, 2, 3]
    for drop in drops:
        kl = {layer: brute_force_kl(folder, [i for i in left if i != layer], texts) for layer in left}
        assert drop.layer == min(kl, key=kl.__getitem__)
        assert drop.kl_nats == pytest.approx(kl[drop.layer], rel=1e-3)
        left.remove(drop.layer)
    assert kept == left


def test_a_short_shortlist_still_finds_enough_layers_and_measures_them_right(tmp_path):
    folder = build_tiny(tmp_path / "model", num_layers=6)
    stack, texts = calibrated(folder)
    kept, drops = prune(stack, texts, num_layers=1, shortlist=2)
    assert sorted([*kept, *(drop.layer for drop in drops)]) == list(range(6))
    assert drops[-1].kl_nats == pytest.approx(brute_force_kl(folder, kept, texts), rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pruned_folder_reloads_and_generates_with_its_cache(tmp_path, architecture, calibration):
    folder = build_tiny(tmp_path / "model", architecture, num_layers=4)
    report = prune_model(str(folder), 2, calibration, tmp_path / "student", healing_steps=0)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 2
    assert student.generation_config.eos_token_id == 1
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "student")("Hello").input_ids == AutoTokenizer.from_pretrained(folder)("Hello").input_ids
    )
    ids = torch.tensor([[20, 21, 22]])
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(student.generate(ids, use_cache=True, **greedy), student.generate(ids, use_cache=False, **greedy))

    cut = Stack(str(folder))
    cut.install(report["kept"])
    assert torch.allclose(student(ids, use_cache=False).logits, cut.model(ids, use_cache=False).logits, atol=1e-5)


def test_only_answers_up_to_their_stop_are_scored(tmp_path):
    _, texts = calibrated(build_tiny(tmp_path / "model"))
    for prompt, ids, scored in zip(PROMPTS, texts.ids_BT, texts.scored_BT, strict=True):
        answer = ids[len(prompt) : int(scored.nonzero().max()) + 2].tolist()
        assert ids[: len(prompt)].tolist() == prompt
        assert 1 not in answer[:-1]
        assert answer[-1] == 1 or len(answer) == 12
        assert ids.roll(-1)[scored].tolist() == answer


def test_healing_brings_the_student_nearer_and_leaves_embeddings_alone(tmp_path):
    folder = build_tiny(tmp_path / "model", num_layers=4)
    full, texts = calibrated(folder)
    pruned = Stack(str(folder))
    pruned.install([0, 1, 3])
    before = measure_kl(full, pruned, texts)
    embeddings = pruned.model.get_input_embeddings().weight.clone()
    heal(full, pruned, [texts] * 8)
    assert measure_kl(full, pruned, texts) < 0.9 * before
    assert torch.equal(pruned.model.get_input_embeddings().weight, embeddings)


def test_a_pruned_name_is_made_once_and_read_from_the_cache(tmp_path, monkeypatch, calibration):
    monkeypatch.setenv("OPD_CACHE_DIR", str(tmp_path / "cache"))
    folder = build_tiny(tmp_path / "model", num_layers=3)
    source = PromptSource(path=str(calibration))
    made = resolve_student(f"pruned:{folder}:2", source)
    monkeypatch.setattr("opd_governor.services.inputs.prune.make_student", None)
    assert resolve_student(f"pruned:{folder}:2", source) == made
    assert AutoModelForCausalLM.from_pretrained(made).config.num_hidden_layers == 2


def test_mistakes_are_one_line(tmp_path, calibration):
    folder = build_tiny(tmp_path / "model", num_layers=2)
    with pytest.raises(JobError, match=r"--layers 2: .* has 2 layers; give a number from 1 to 1"):
        prune_model(str(folder), 2, calibration, tmp_path / "student")
    with pytest.raises(JobError, match="exists already"):
        prune_model(str(folder), 1, calibration, folder)
    with pytest.raises(JobError, match="no such file"):
        prune_model(str(folder), 1, tmp_path / "absent.jsonl", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_the_report_shows_each_drop():
    report = {"kept": [0, 2], "drops": [{"layer": 1, "kl_nats": 0.25}], "kl_pruned_nats": 0.25, "kl_healed_nats": 0.125}
    shown = render(report)
    assert "0.2500" in shown
    assert "after healing 0.1250" in shown
