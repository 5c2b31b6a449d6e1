"""Small tokenizers of every kind that pretrained models use, trained on the spot: deterministic, in a second."""

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deploy.sums.tokenizer import build_tokenizer

CORPUS = [
    "The teacher reads the student's answer: 12 + 345 = 357, and 1000 is not 10000.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1999, 2024))\n",
    "  spaces   of  every    width,\ttabs\tand\r\nline ends  ",
    "Über naïve Café señor. Ça va? 老师教学生写字。今天天气很好。 日本語のテキスト",
    "😀😃 emoji 👩‍👩‍👧 and flags 🇩🇪, a sum ∑ of x² over ½",
]
STOP = "<|end|>"
THINK = "<think>"
SPACE = "▁"
"""What SentencePiece writes a space as: the one character that its vocabularies cannot spell."""


@cache
def byte_level(vocabulary: int = 420, normal_form: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, SmolLM; with `normal_form` Qwen, which puts its texts into NFC."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normal_form:
        core.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    return _finished(core)


@cache
def sentencepiece(gemma: bool) -> PreTrainedTokenizerFast:
    """Llama 2 (a space before the first word, taken back by the decoder) or Gemma (none): pieces with byte fallback."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    tree = json.loads(core.to_str())["model"]
    byte_tokens = [f"<0x{code:02X}>" for code in range(256)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", *byte_tokens, *tree["vocab"]])}
    merges = [tuple(pair) for pair in tree["merges"]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
    return _finished(core)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """T5, XLNet and newer Llama files: a Unigram with byte fallback behind Metaspace, which puts a space before the text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    core.train_from_iterator(CORPUS[:3], trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>"))
    pieces = [tuple(piece) for piece in json.loads(core.to_str())["model"]["vocab"]]
    byte_tokens = [(f"<0x{code:02X}>", -20.0) for code in range(256)]
    plain = [("<unk>", 0.0), *byte_tokens, *(piece for piece in pieces if piece[0] != "<unk>")]
    core.model = models.Unigram(plain, unk_id=0, byte_fallback=True)
    return _finished(core)


def characters() -> PreTrainedTokenizerFast:
    """The sums' own: a word list, one token a character, and no way to spell any other."""
    return build_tokenizer(256)


@cache
def pairs() -> PreTrainedTokenizerFast:
    """Of the sums' alphabet, pairs merged: plain BPE on characters, ids in another order."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[?$]"), "isolated")
    core.decoder = decoders.Fuse()
    text = ["".join(f"{a}+{b}={(a + b) % 10};" for a in range(10) for b in range(10)) + "?!$", "abcdefghijklmnop"]
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=70, max_token_length=2, show_progress=False))
    return _finished(core)


def _finished(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(STOP, special=True), AddedToken(THINK, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=STOP, clean_up_tokenization_spaces=False)


def renumbered(tokenizer: PreTrainedTokenizerFast, order: list[int]) -> PreTrainedTokenizerFast:
    """The same tokens under other ids: what was order[i] is i."""
    new_id = {old: new for new, old in enumerate(order)}
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in tree["added_tokens"]:
        tree["model"]["vocab"][added["content"]] = added["id"]  # else the library numbers them itself
        added["id"] = new_id[added["id"]]
    tree["model"]["vocab"] = {token: new_id[old] for token, old in tree["model"]["vocab"].items()}
    core = Tokenizer.from_str(json.dumps(tree))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=STOP, clean_up_tokenization_spaces=False)
