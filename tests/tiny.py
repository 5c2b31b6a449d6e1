"""Tiny random Hugging Face models for tests: Llama, Qwen3, Gemma 3 and GPT-2 folders of a few hundred kB each.

>>> folder = build_tiny(tmp_path / "student", "llama", seed=1)
>>> AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id
1
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen3", "gemma3", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen3", "gemma3", "gpt2")

SPECIAL = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")
"""Ids 0 to 3."""
CHARACTERS = tuple("\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?+-=*/'\"()$#")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat: bool = False, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per character. `extra` adds tokens at the end of the vocabulary, `chat` a ChatML template."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS, *extra))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    if chat:
        fast.chat_template = CHATML
    return fast


def build_tiny(
    folder: Path,
    architecture: Architecture = "llama",
    *,
    seed: int = 0,
    num_layers: int = 2,
    tied: bool | None = None,
    chat: bool = False,
    eos: int | list[int] = 1,
    context_tokens: int = 256,
    extra: tuple[str, ...] = (),
) -> Path:
    """Write a random model with its tokenizer and generation_config; heads are 32 wide (the least vLLM's CPU attention takes).

    `tied` None keeps the architecture's own habit (Gemma 3 and GPT-2 tie). The same seed gives the same weights.
    """
    tokenizer = tiny_tokenizer(chat, extra)
    config = _config(architecture, len(tokenizer), num_layers, context_tokens)
    if tied is not None:
        config.tie_word_embeddings = tied
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, eos
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:  # wide enough that outputs depend on the context, narrow enough that no token has all the mass
                    embedding = "embed" in name or "wte" in name
                    weight.normal_(0, 0.1 if embedding and config.tie_word_embeddings else 0.3)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(architecture: Architecture, vocab_size: int, num_layers: int, context_tokens: int) -> Any:
    if architecture == "gpt2":
        shape = {"n_embd": 64, "n_head": 2, "n_layer": num_layers, "n_positions": context_tokens, "n_inner": 128}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return AutoConfig.for_model("gpt2", vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, **no_dropout, **shape)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": context_tokens,
    }
    if architecture == "gemma3":
        window = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2 + 1)}
        window["layer_types"] = window["layer_types"][:num_layers]
        return AutoConfig.for_model("gemma3_text", vocab_size=vocab_size, query_pre_attn_scalar=32, **window, **shape)
    return AutoConfig.for_model(architecture, vocab_size=vocab_size, **shape)
