"""Model folders that people bring, as cases (see cases.py), and the students whose tokenizers the other cases need."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.doors.cases import GOOD, Case, Tree, Write, both, lines
from tests.tiny import CHATML, build_tiny, tiny_tokenizer

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BROKEN = "{{ messages[0]['content'] + messages[0]['weight'] * 2 }}"
PICKY = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] in ('system', 'user', 'assistant') %}"
)
BOSSY = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}" + CHATML
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def students(root: Path) -> dict[str, Path]:
    """A folder for each kind of tokenizer."""
    found = {"plain": build_tiny(root / "plain", seed=1)}
    templates = {"chat": CHATML, "strict": STRICT, "broken": BROKEN, "thinking": THINKING, "picky": PICKY, "bossy": BOSSY}
    for name, template in templates.items():
        found[name] = build_tiny(root / name, seed=1)
        save(found[name], template=template)
    found["bos"] = build_tiny(root / "bos", seed=1)
    save(found["bos"], bos=True)
    return found


def save(folder: Path, *, template: str | None = None, bos: bool = False) -> None:
    """Another tokenizer into a model's folder: with this chat template, or adding a BOS by itself."""
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)])
    tokenizer.save_pretrained(folder)


def changed(role: str, change: Callable[[Path], Any]) -> Write:
    """The student's or the teacher's folder, changed."""

    def write(folder: Path, job: Tree) -> None:
        lines(*GOOD)(folder, job)
        change(Path(job[role]["model"]))

    return write


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def another(config_of: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda folder: config_of().save_pretrained(folder)


def wide_tokenizer(folder: Path) -> None:
    tiny_tokenizer(extra=("é", "è")).save_pretrained(folder)


def torn_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 1 << 12])


def template_file(folder: Path) -> None:
    save(folder, template="{{ raise_exception('never') }}")


def missing_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(folder: Path) -> None:
    config(auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"}, model_type="mine")(folder)
    (folder / "mine.py").write_text("raise RuntimeError('my own code broke')\n")


def values(name: str, **values: Any) -> Callable[[Path], None]:
    """A JSON file of the folder with these keys."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def weights(change: Callable[[str, Any], dict[str, Any]]) -> Callable[[Path], None]:
    """Each tensor replaced by those that `change` gives for its name and itself."""

    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        named = {new: t.contiguous() for name, tensor in load_file(file).items() for new, t in change(name, tensor).items()}
        save_file(named, file, {"format": "pt"})

    return write


def two_shards(folder: Path) -> None:
    """As a download that left the index out."""
    tensors = load_file(folder / "model.safetensors")
    for shard, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        save_file({name: tensors[name] for name in names}, folder / f"model-0000{shard}-of-00002.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()


def half_an_index(folder: Path) -> None:
    """An index that names half of the tensors."""
    names = sorted(load_file(folder / "model.safetensors"))[::2]
    two_shards(folder)
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def named_templates(folder: Path) -> None:
    """As Command R's tokenizers have them."""
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]
    save(folder)
    values("tokenizer_config.json", chat_template=named)(folder)


def llama_of_own_code(folder: Path, base: bool = False) -> None:
    """A Llama that only code in its own folder knows. `base`: AutoModel is in its auto_map too."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"} | ({"AutoModel": "own.OwnBase"} if base else {})
    config(auto_map=auto_map, model_type="own-kind", architectures=["OwnModel"])(folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-kind'\n\n\n"
        "class OwnBase(LlamaModel):\n    config_class = OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def trusted(folder: Path, job: Tree) -> None:
    changed("student", own_code)(folder, job)
    job["student"]["trust_remote_code"] = True


def tiny_moe() -> Any:
    return AutoConfig.for_model("mixtral", vocab_size=85, hidden_size=64, num_local_experts=4, max_position_embeddings=256, eos_token_id=1)


def gemma3() -> Any:
    return AutoConfig.for_model("gemma3", text_config={"vocab_size": 85, "max_position_embeddings": 256})


def no_end(folder: Path) -> None:
    config(eos_token_id=None)(folder)
    (folder / "generation_config.json").write_text("{}")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))


MODELS = [
    Case("a student that never ends", 0, ["the student stops on nothing"], changed("student", no_end)),
    Case("a tokenizer that is missing", 3, ["the tokenizer of"], changed("student", lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")])),
    Case("a tokenizer config that is a list", 3, ["the tokenizer of", "says: 'list' object"], changed("student", text("tokenizer_config.json", "[]"))),
    Case("a config with words for numbers", 3, ["vocab_size"], changed("student", config(vocab_size="many"))),
    Case("empty weights", 3, ["model.safetensors says"], changed("student", text("model.safetensors", ""))),
    Case("a named tokenizer that is missing", 3, ["the tokenizer of ./nope says"], both(lines(*GOOD), lambda f, j: j["student"].update(tokenizer="./nope"))),
    Case("a template that is no Jinja", 2, ["the student's chat template says: expected token 'in'"], both(lines({"prompt": "x"}, chat=True), lambda f, j: save(Path(j["student"]["model"]), template="{% for x %}"))),
    Case("a template without end", 2, ["Range too big"], both(lines({"prompt": "x"}, chat=True), lambda f, j: save(Path(j["student"]["model"]), template="{% for i in range(10**9) %}x{% endfor %}"))),
    Case("a pruned name without a number", 3, ["expected pruned:MODEL:LAYERS"], both(lines(*GOOD), lambda f, j: j["student"].update(model="pruned:x"))),
    Case("a missing model folder", 3, ["student.model: model ./absent: no such folder"], lambda f, j: j["student"].update(model="./absent")),
    Case("a folder without config", 3, ["has no config.json"], changed("student", without("config.json"))),
    Case("pickled weights alone", 3, ["pickled weights are not loaded"], changed("student", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))),
    Case("an adapter", 3, ["is an adapter of org/base; merge it into its base"], changed("student", text("adapter_config.json", '{"base_model_name_or_path": "org/base"}'))),
    Case("an adapter that does not say of what", 3, ["is an adapter; merge it"], changed("teacher", text("adapter_config.json", "{"))),
    Case("a config that is not JSON", 3, ["student.model", "config.json"], changed("student", text("config.json", "{"))),
    Case("a config of an unknown kind", 3, ["student.model", "nobody"], changed("student", config(model_type="nobody"))),
    Case("own code that is not trusted", 3, ["student.model", "trust_remote_code"], changed("student", own_code)),
    Case("own code that breaks", 3, ["my own code broke"], trusted),
    Case("torn weights", 3, ["model.safetensors says", "fetch the folder again"], changed("student", torn_weights)),
    Case("a missing shard", 3, ["model-00002-of-00002.safetensors is missing (1 of 2 shards)"], changed("student", missing_shard)),
    Case("a torn index", 3, ["model.safetensors.index.json says"], changed("student", text("model.safetensors.index.json", "{"))),
    Case("a tokenizer that is torn", 3, ["the tokenizer of"], changed("student", text("tokenizer.json", "{"))),
    Case("a tokenizer larger than the embedding", 3, ["has ids up to 86, its embedding 85 rows"], changed("student", wide_tokenizer)),
    Case("a stop id beyond the embedding", 3, ["stops on id 999"], changed("student", config(eos_token_id=999))),
    Case("a generation config that is torn", 3, ["generation_config.json"], changed("student", text("generation_config.json", "{"))),
    Case("a teacher's torn config", 3, ["teacher teacher: model"], changed("teacher", text("config.json", "[]"))),
    Case("AWQ for the torch back end", 3, ["quantised (awq), and backend torch says", "set its backend to vllm or http"], changed("teacher", config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32}))),
    Case("GPTQ for the torch back end", 3, ["quantised (gptq), and backend torch says"], changed("teacher", config(quantization_config={"quant_method": "gptq", "bits": 4}))),
    Case("compressed tensors, whose package is there", 0, ["quantised (compressed-tensors)"], changed("teacher", config(quantization_config={"quant_method": "compressed-tensors"}))),
    Case("a method of quantisation nobody knows", 3, ["quantised (magic), and backend torch says"], changed("teacher", config(quantization_config={"quant_method": "magic"}))),
    Case("a quantised student", 3, ["quantised (gptq) and cannot be trained"], changed("student", config(quantization_config={"quant_method": "gptq", "bits": 4}))),
    Case("a mixture of experts as the student", 3, ["a mixture of 4 experts", "give a dense student"], changed("student", another(tiny_moe))),
    Case("a multimodal wrapper as the student", 3, ["a multimodal wrapper (Gemma3Config)"], changed("student", another(gemma3))),
    Case("an encoder-decoder", 3, ["T5Config is an encoder-decoder"], changed("student", another(lambda: AutoConfig.for_model("t5", vocab_size=85)))),
    Case("an encoder", 3, ["ViTConfig"], changed("student", another(lambda: AutoConfig.for_model("vit")))),
    Case("a template that takes no answers", 0, ["chat template, on a question and an answer, says: never"], changed("student", template_file)),
    Case("an index that is missing", 3, ["model.safetensors.index.json is missing beside model-00001-of-00002.safetensors"], changed("student", two_shards)),
    Case("an index of half the tensors", 3, ["its weights lack model.embed_tokens.weight", "start at random"], changed("student", half_an_index)),
    Case("a layer without its MLP", 3, ["its weights lack model.layers.1.mlp.down_proj.weight", "start at random"], changed("student", weights(lambda name, t: {} if "layers.1.mlp" in name else {name: t}))),
    Case("a teacher without its head", 3, ["teacher teacher: model", "its weights lack lm_head.weight"], changed("teacher", weights(lambda name, t: {} if "lm_head" in name else {name: t}))),
    Case("weights of other names", 3, ["its weights lack"], changed("student", weights(lambda name, t: {f"x.{name}": t}))),
    Case("weights of another shape", 3, ["has shape [64, 128], its config asks for [128, 64]"], changed("student", weights(lambda name, t: {name: t.T if "up_proj" in name else t}))),
    Case("whole numbers for weights", 3, ["holds whole numbers (I8)"], changed("student", weights(lambda name, t: {name: t.to(torch.int8)}))),
    Case("weights that are NaN", 3, ["student", "holds NaN or infinity"], changed("student", weights(lambda name, t: {name: t * float("nan")}))),
    Case("a teacher with one infinite norm", 3, ["teacher", "model.norm.weight holds NaN or infinity"], changed("teacher", weights(lambda name, t: {name: t / 0 if name == "model.norm.weight" else t}))),
    Case("weights in float16", 0, ["120 prompts"], changed("student", weights(lambda name, t: {name: t.half()}))),
    Case("a vocabulary larger than the weights", 3, ["has shape [85, 64], its config asks for [90, 64]"], changed("student", config(vocab_size=90))),
    Case("a layer more than the weights have", 3, ["its weights lack model.layers.2"], changed("student", config(num_hidden_layers=3))),
    Case("a layer fewer than the weights have", 0, ["its config has no place for model.layers.1"], changed("student", config(num_hidden_layers=1))),
    Case("weights that lack one byte", 3, ["model.safetensors says", "fetch the folder again"], changed("student", lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]) and None)),
    Case("a config that names no architecture", 0, ["120 prompts"], changed("student", values("config.json", architectures=None))),
    Case("an architecture nobody knows", 3, ["names FooForCausalLM, not LlamaForCausalLM"], changed("student", config(architectures=["FooForCausalLM"]))),
    Case("a reward model", 3, ["names LlamaForSequenceClassification, not LlamaForCausalLM"], changed("student", config(architectures=["LlamaForSequenceClassification"]))),
    Case("rope of the old form", 0, ["120 prompts"], changed("student", config(rope_scaling={"type": "linear", "factor": 2.0}))),
    Case("rope of a kind nobody knows", 3, ["a model of its config cannot be made", "banana"], changed("student", config(rope_scaling={"rope_type": "banana", "factor": 4.0}))),
    Case("rope by a factor in words", 3, ["a model of its config cannot be made"], changed("student", config(rope_scaling={"type": "linear", "factor": "2"}))),
    Case("a type of weights nobody knows", 3, ["float99"], changed("student", config(dtype="float99"))),
    Case("an eos of -1", 3, ["stops on id -1 (config)", "mend eos_token_id"], changed("student", config(eos_token_id=-1))),
    Case("an eos as text", 3, ["eos_token_id"], changed("student", config(eos_token_id="10"))),
    Case("no eos at all in a list", 0, ["120 prompts"], changed("student", config(eos_token_id=[]))),
    Case("two eos ids", 0, ["the student stops on 1 '<eos>' (generation_config, config, tokenizer), 3 '<|im_end|>' (generation_config)"], changed("student", values("generation_config.json", eos_token_id=[1, 3]))),
    Case("eos ids as words", 3, ["mend its generation_config.json"], changed("student", values("generation_config.json", eos_token_id=["<eos>"]))),
    Case("sampling defaults that contradict each other", 0, ["120 prompts"], changed("student", values("generation_config.json", do_sample=False, temperature=0.6))),
    Case("an eos of an old version", 0, ["120 prompts"], changed("student", values("tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<eos>", "lstrip": False}))),
    Case("an eos that the vocabulary lacks", 3, ["has ids up to 85, its embedding 85 rows"], changed("student", values("tokenizer_config.json", eos_token="</s>"))),
    Case("a tokenizer's own code that is not trusted", 3, ["the tokenizer of", "brings custom code of its own; set trust_remote_code"], changed("student", values("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tok", None]}, tokenizer_class="Tok"))),
    Case("a tokenizer that truncates and pads", 0, ["the longest 16 tokens"], changed("student", values("tokenizer.json", truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}))),
    Case("templates by name", 0, ["3 '<|im_end|>' (chat template)"], changed("student", named_templates)),
    Case("own code that vLLM cannot make", 3, ["(OwnModel), and vLLM makes such models by AutoModel, which its auto_map lacks"], both(changed("student", llama_of_own_code), lambda f, j: j["student"].update(trust_remote_code=True))),
]  # fmt: skip
