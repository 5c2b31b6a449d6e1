"""A tokenizer as bytes: what each of its ids stands for, and the ids of exactly these bytes.

Two vocabularies have nothing in common but the bytes of a text. Everything between them rests on this table.
"""

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How byte-fallback vocabularies write a single byte."""


class TokenizerError(ValueError):
    """A tokenizer whose tokens cannot be read as bytes: one line, for whoever chose the model."""


class ByteTokenizer:
    """A Hugging Face fast tokenizer, read as bytes.

    Known: byte-level BPE (GPT-2, Qwen, Llama 3, SmolLM), SentencePiece kinds with or without byte fallback (Gemma, Llama 2), and
    vocabularies of plain text. Special tokens stand for no bytes: they are events. Raises TokenizerError for any other decoder
    and for a tokenizer without a fast form.

    >>> tokens = ByteTokenizer(AutoTokenizer.from_pretrained("deploy/sums/student"))  # doctest: +SKIP
    >>> tokens.encode("3+7"), tokens.bytes_of(8)
    ([5, 12, 9], b'6')
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(f"tokenizer {tokenizer.name_or_path}: has no fast form (tokenizer.json); save one beside the model")
        tree = json.loads(backend.to_str())
        self._added = {added["id"]: added for added in tree["added_tokens"]}
        self._read = _Reading(tree["decoder"], tree["pre_tokenizer"], str(tokenizer.name_or_path))
        self._core = _exact(tree)
        self.size: int = self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of this text and of nothing else: no BOS, no prefix space; a special token's name in the text is text.

        Raises ValueError for a text that the vocabulary cannot spell.
        """
        try:
            return list(self._core.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(f"{text!r} cannot be encoded: {error}") from error

    def bytes_of(self, token_id: int) -> bytes | None:
        """What an id stands for; None: a special token, or an id that the vocabulary does not have."""
        return self._table.get(token_id)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Name of each special token -> its id."""
        return {added["content"]: token_id for token_id, added in self._added.items() if added["special"]}

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """Bytes -> the id that stands for them. Of several, a piece of text comes before a byte token, then the lowest id."""
        found: dict[bytes, int] = {}
        for token_id in sorted(self._table, key=lambda token_id: (self._is_byte_token(token_id), token_id)):
            found.setdefault(self._table[token_id], token_id)
        return found

    def _is_byte_token(self, token_id: int) -> bool:
        return BYTE_TOKEN.fullmatch(self._core.id_to_token(token_id) or "") is not None

    @cached_property
    def _table(self) -> dict[int, bytes]:
        table: dict[int, bytes | None] = {}
        for token, token_id in self._core.get_vocab(with_added_tokens=True).items():
            if token_id in self._added:
                table[token_id] = None if self._added[token_id]["special"] else token.encode()
            else:
                table[token_id] = self._read.bytes_of(token)
        return {token_id: data for token_id, data in table.items() if data is not None}


class _Reading:
    """How a vocabulary's strings turn into bytes, from the decoder that its tokenizer.json names."""

    def __init__(self, decoder: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, name: str) -> None:
        steps = _steps(decoder, "decoders")
        self._byte_level = any(step["type"] == "ByteLevel" for step in [*steps, *_steps(pre_tokenizer, "pretokenizers")])
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self._replaced: list[tuple[str, str]] = []
        for step in steps:
            match step["type"]:
                case "Metaspace":
                    self._replaced.append((step["replacement"], " "))
                case "Replace" if "String" in step["pattern"]:
                    self._replaced.append((step["pattern"]["String"], step["content"]))
                case "ByteLevel" | "ByteFallback" | "Fuse" | "Strip":
                    pass  # Strip takes back the prefix space, which is never added here
                case kind:
                    raise TokenizerError(f"tokenizer {name}: its decoder {kind} is not known here; choose a model of another family")

    def bytes_of(self, token: str) -> bytes | None:
        if self._byte_level:
            codes = [BYTE_OF_CHARACTER.get(character) for character in token]
            return None if None in codes else bytes(code for code in codes if code is not None)
        if self._byte_fallback and BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        return token.encode()


def _steps(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A part of tokenizer.json as the list of its steps."""
    if part is None:
        return []
    return [step for member in part[members] for step in _steps(member, members)] if part["type"] == "Sequence" else [part]


def _exact(tree: dict[str, Any]) -> Tokenizer:
    """The tokenizer without what changes a text's bytes: prefix space, Unicode normal form, truncation, special tokens around it."""

    def keep(part: Any, members: str) -> Any:
        if part is None or part["type"] in ("Prepend", "NFC", "NFKC", "NFD", "NFKD", "Strip"):
            return None
        if part["type"] == "Sequence":
            kept = [member for member in (keep(member, members) for member in part[members]) if member is not None]
            return part | {members: kept} if kept else None
        if part["type"] == "Metaspace":
            return part | {"prepend_scheme": "never"}
        return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part

    changed = {
        "normalizer": keep(tree["normalizer"], "normalizers"),
        "pre_tokenizer": keep(tree["pre_tokenizer"], "pretokenizers"),
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    # Named in a text, a special token is text: only the student's own special ids are events.
    core = Tokenizer.from_str(json.dumps(tree | changed))
    core.encode_special_tokens = True
    return core


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {chr(0x100 + place): code for place, code in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


def utf8_runs(data: bytes) -> list[tuple[int, int, str | None]]:
    """Bytes as runs (start, end, text) in order; text None: bytes that are no UTF-8.

    >>> utf8_runs("né".encode() + b"\\xff!")
    [(0, 3, 'né'), (3, 4, None), (4, 5, '!')]
    """
    runs: list[tuple[int, int, str | None]] = []
    start = 0
    while start < len(data):
        try:
            runs.append((start, len(data), data[start:].decode()))
            break
        except UnicodeDecodeError as error:
            bad, good_again = start + error.start, start + error.end
            if error.start:
                runs.append((start, bad, data[start:bad].decode()))
            runs.append((bad, good_again, None))
            start = good_again
    return runs
