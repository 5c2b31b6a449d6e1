"""Back ends that score responses under a teacher: one protocol, `TorchScorer` here, `VllmScorer` and `HttpScorer` beside it.

Shapes: B = sequences of a batch, S = their padded length, T = tokens of one response, N = response tokens of a batch,
D = hidden width, V = vocabulary, C = positions of a chunk, K = support size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load
from transformers import GenerationConfig

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.packing import like_lengths
from opd_governor.actors.teacher.scoring import PAD_ID, score_positions
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import Rest, TokenScores


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One response to score. What comes back besides the sampled token and the stop class is its support.

    >>> ScoreRequest(prompt_token_ids=(5, 9, 3), token_ids=(7, 2), top_k=8).num_tokens
    5
    """

    prompt_token_ids: tuple[int, ...]
    """What the teacher sees before the response; never empty."""
    token_ids: tuple[int, ...]
    """[T] the response, unchanged."""
    support_ids_TK: np.ndarray | None = field(default=None, repr=False)
    """[T, K] ids to score at each position (the student's own); -1 pads a row. They come first in the answer's support."""
    top_k: int = 0
    """Teacher's own most likely ids to add; 0: none."""
    rest: Rest | None = None
    """Add a column REST_ID with the log-prob of all that is not listed, where the back end knows the whole vocabulary."""
    hidden: bool = False
    """Give the hidden states, and no log-prob at all (back end `torch`)."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise CallerError("prompt_token_ids is empty: the first response token needs a token before it")
        if self.support_ids_TK is not None and len(self.support_ids_TK) != len(self.token_ids):
            raise CallerError(f"support_ids_TK has {len(self.support_ids_TK)} rows for {len(self.token_ids)} response tokens")

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How the teacher answers prompts itself. Beams above 1 search; otherwise temperature 0 is greedy, above 0 samples."""

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


FIRST_ROUND_TOKENS = 32
"""Of generate; each further round doubles what there is."""


def generate_timeout_s(settings: TeacherSettings, options: GenerateOptions) -> float:
    """One `timeout_s` for the prompts and one per 32 decoded tokens: a pass per token, each far cheaper than scoring a full batch."""
    return settings.timeout_s * (1 + options.max_new_tokens / 32)


class Scorer(Protocol):
    """A frozen teacher. `score` keeps the order of its requests; None: this one could not be scored (only where a server answers)."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]: ...

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]: ...


@runtime_checkable
class Follows(Protocol):
    """A scorer that takes new weights while it serves."""

    def follow(self, weights: bytes) -> None: ...


class TorchScorer:
    """A transformers causal model. Float32 log-probs whatever its dtype; logits exist for `chunk_tokens` positions at a time.

    Raises ValueError for stop ids outside the vocabulary, a response longer than the context window, or an architecture whose
    output head is more than a linear layer with a known cap or scale.
    """

    def __init__(
        self, settings: TeacherSettings, stop_ids: tuple[int, ...], device: str | None = None, *, num_ids: int | None = None
    ) -> None:
        """`num_ids`: the model's ids that are tokens. None: as many as its embedding has rows."""
        self.settings = settings
        self.stop_ids = stop_ids
        trust = settings.trust_remote_code
        self.lm = CausalLM(settings.model, dtype=settings.dtype, device=device, trust_remote_code=trust, num_ids=num_ids)
        self.lm.model.requires_grad_(False)
        # The checkpoint's own sampling defaults (top_p, penalties) would bend golden answers.
        self.lm.model.generation_config = GenerationConfig()
        require_stop_ids(stop_ids, self.lm.vocabulary)

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        scores: list[TokenScores | None] = [None] * len(requests)
        check_window(self.settings.name, requests, self.lm.context_tokens)
        for batch in like_lengths([request.num_tokens for request in requests], self.settings.batch_tokens):
            for index, scored in zip(batch, self._score_batch([requests[index] for index in batch]), strict=True):
                scores[index] = scored
        return scores

    @torch.no_grad()
    def follow(self, weights: bytes) -> None:
        """Take the weights of a safetensors file, by the names of the model's own."""
        own = dict(self.lm.model.named_parameters()) | dict(self.lm.model.named_buffers())
        for name, tensor in load(weights).items():
            own[name].copy_(tensor)

    @torch.inference_mode()
    def _score_batch(self, requests: list[ScoreRequest]) -> list[TokenScores]:
        # Padding on the right: under causal attention no real token ever sees it, positions start at 0.
        width = max(request.num_tokens for request in requests)
        ids_BS = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            ids_BS[row, : request.num_tokens] = torch.tensor(request.prompt_token_ids + request.token_ids)
        device = self.lm.device
        hidden_BSD = self.lm.hidden(ids_BS.to(device))
        # Token t of a response is predicted at position len(prompt) - 1 + t; prompt positions get no logits.
        hidden_ND = torch.cat([hidden_BSD[row, len(r.prompt_token_ids) - 1 : r.num_tokens - 1] for row, r in enumerate(requests)])
        if any(request.hidden for request in requests):
            return hidden_scores(self.settings.name, requests, hidden_ND)
        sampled_N = torch.tensor([token for request in requests for token in request.token_ids], dtype=torch.long, device=device)
        given_ids_NK = join_supports(requests)
        scored = score_positions(
            hidden_ND,
            self.lm.head,
            sampled_N,
            self.stop_ids,
            top_k=max(request.top_k for request in requests),
            given_ids_NK=None if given_ids_NK is None else torch.from_numpy(given_ids_NK).to(device),
            chunk_tokens=self.settings.chunk_tokens,
            rest=requests[0].rest,
        )
        return split_scores(
            self.settings.name,
            requests,
            scored.sampled_logp_N.cpu().numpy(),
            scored.stop_logp_N.cpu().numpy(),
            scored.support_ids_NK.to(torch.int32).cpu().numpy(),
            scored.support_logp_NK.cpu().numpy(),
        )

    @torch.inference_mode()
    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        """Answers cut after their first stop id; one that has none ran to `max_new_tokens`.

        The same prompts, options and device give the same answers. Prompts are padded on the left. Answers that ended leave the batch
        after 32 tokens, 64, 128 and so on: the others begin again there, which costs one pass over what they have.
        """
        answers: list[tuple[int, ...]] = [()] * len(prompts)
        sampling = options.beams == 1 and options.temperature > 0
        config = GenerationConfig(
            do_sample=sampling,
            temperature=options.temperature if sampling else None,
            top_k=0 if sampling else None,
            num_beams=options.beams,
            length_penalty=options.length_penalty if options.beams > 1 else None,
            early_stopping=True if options.beams > 1 else None,
            no_repeat_ngram_size=options.no_repeat_ngram or None,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.stop_ids[0],
        )
        device, left = self.lm.device, list(range(len(prompts)))
        with torch.random.fork_rng(devices=[device] if device.type != "cpu" else []):
            torch.manual_seed(options.seed)
            for num_new in _rounds(options):
                config.max_new_tokens = num_new
                so_far = [prompts[index] + answers[index] for index in left]
                lengths = [(len(ids) + num_new) * options.beams for ids in so_far]
                for batch in like_lengths(lengths, self.settings.batch_tokens, max_padding_ratio=1):
                    width = max(len(so_far[row]) for row in batch)
                    ids_BS = torch.full((len(batch), width), self.stop_ids[0], dtype=torch.long)
                    mask_BS = torch.zeros(len(batch), width, dtype=torch.long)
                    for b, row in enumerate(batch):
                        ids_BS[b, width - len(so_far[row]) :] = torch.tensor(so_far[row])
                        mask_BS[b, width - len(so_far[row]) :] = 1
                    out_BS = self.lm.model.generate(ids_BS.to(device), attention_mask=mask_BS.to(device), generation_config=config)
                    for row, new_ids in zip(batch, out_BS[:, width:].tolist(), strict=True):
                        answers[left[row]] += cut_at_stop(new_ids, self.stop_ids)
                left = [index for index in left if answers[index][-1] not in self.stop_ids]
                if not left:
                    break
        return answers


def _rounds(options: GenerateOptions) -> Iterator[int]:
    """New tokens of each round. Beams cannot begin again in the middle."""
    done, num_new = 0, options.max_new_tokens if options.beams > 1 else FIRST_ROUND_TOKENS
    while done < options.max_new_tokens:
        yield min(num_new, options.max_new_tokens - done)
        done += num_new
        num_new = done


def check_window(teacher: str, requests: Sequence[ScoreRequest], context_tokens: int | None) -> None:
    """Raises ValueError for a request longer than the teacher's context window."""
    longest = max((request.num_tokens for request in requests), default=0)
    if context_tokens is not None and longest > context_tokens:
        raise CallerError(
            f"teacher {teacher}: prompt and response have {longest} tokens, its context window {context_tokens}; "
            "lower rollout.max_new_tokens or shorten the prompts"
        )


def join_supports(requests: Sequence[ScoreRequest]) -> np.ndarray | None:
    """The requests' given ids under one another, [N, K] int64 of the widest; None when no request gives any."""
    width = max((request.support_ids_TK.shape[1] for request in requests if request.support_ids_TK is not None), default=0)
    if width == 0:
        return None
    ids_NK = np.full((sum(len(request.token_ids) for request in requests), width), PAD_ID, dtype=np.int64)
    start = 0
    for request in requests:
        if request.support_ids_TK is not None:
            ids_NK[start : start + len(request.token_ids), : request.support_ids_TK.shape[1]] = request.support_ids_TK
        start += len(request.token_ids)
    return ids_NK


def split_scores(
    teacher: str,
    requests: Sequence[ScoreRequest],
    sampled_logp_N: np.ndarray,
    stop_logp_N: np.ndarray,
    ids_NK: np.ndarray,
    logp_NK: np.ndarray,
) -> list[TokenScores]:
    """A batch's scores cut into its responses; of the joined support each keeps the columns it asked for."""
    joined_given = max((r.support_ids_TK.shape[1] for r in requests if r.support_ids_TK is not None), default=0)
    results, start = [], 0
    for request in requests:
        rows = slice(start, start := start + len(request.token_ids))
        own_given = 0 if request.support_ids_TK is None else request.support_ids_TK.shape[1]
        num_rest = int(request.rest is not None)
        own_top = min(request.top_k, ids_NK.shape[1] - joined_given - num_rest)
        columns = np.concatenate([np.arange(own_given), joined_given + np.arange(own_top), ids_NK.shape[1] - 1 - np.arange(num_rest)])
        results.append(
            TokenScores(
                teacher=teacher,
                sampled_logp_T=sampled_logp_N[rows].copy(),
                stop_logp_T=stop_logp_N[rows].copy(),
                support_ids_TK=ids_NK[rows][:, columns] if columns.size else None,
                support_logp_TK=logp_NK[rows][:, columns] if columns.size else None,
            )
        )
    return results


def hidden_scores(teacher: str, requests: Sequence[ScoreRequest], hidden_ND: torch.Tensor) -> list[TokenScores]:
    """A batch's hidden states cut into its responses."""
    hidden_ND = hidden_ND.cpu()
    array_ND = hidden_ND.view(torch.uint16).numpy() if hidden_ND.dtype == torch.bfloat16 else hidden_ND.float().numpy()
    results, start = [], 0
    for request in requests:
        rows = slice(start, start := start + len(request.token_ids))
        none_T = np.full(len(request.token_ids), np.nan, np.float32)
        results.append(TokenScores(teacher, none_T, none_T, hidden_TH=array_ND[rows].copy()))
    return results


def score_logp(teacher: str, request: ScoreRequest, logp_TV: np.ndarray, stop_ids: tuple[int, ...]) -> TokenScores:
    """Scores of one response from its log-probs over the whole vocabulary, where a back end gives them."""
    scored = score_positions(
        torch.from_numpy(logp_TV),
        lambda logp_CV: logp_CV,
        torch.tensor(request.token_ids, dtype=torch.long),
        stop_ids,
        top_k=request.top_k,
        given_ids_NK=None if request.support_ids_TK is None else torch.from_numpy(request.support_ids_TK.astype(np.int64)),
        rest=request.rest,
    )
    support = scored.support_ids_NK.to(torch.int32).numpy(), scored.support_logp_NK.numpy()
    return split_scores(teacher, [request], scored.sampled_logp_N.numpy(), scored.stop_logp_N.numpy(), *support)[0]


def ids_asked(request: ScoreRequest, stop_ids: tuple[int, ...], vocabulary: int | None) -> np.ndarray:
    """[T, 1 + E + K] int32: the sampled id, the stop ids, the given ids. Those outside a known vocabulary are -1 and score -inf."""
    sampled_T1 = np.array(request.token_ids, np.int32)[:, None]
    stop_TE = np.broadcast_to(np.array(stop_ids, np.int32), (len(sampled_T1), len(stop_ids)))
    given = [] if request.support_ids_TK is None else [request.support_ids_TK.astype(np.int32)]
    asked = np.concatenate([sampled_T1, stop_TE, *given], axis=1)
    return asked if vocabulary is None else np.where(asked < vocabulary, asked, np.int32(PAD_ID))


def scores_of_asked(
    teacher: str, request: ScoreRequest, num_stop_ids: int, asked: np.ndarray, logps: np.ndarray, top: tuple[np.ndarray, np.ndarray] | None
) -> TokenScores:
    """Scores from the log-probs [T, 1 + E + K] of `ids_asked` and, where top_k asks for them, the most likely ids and log-probs."""
    given_from = 1 + num_stop_ids
    none_T0 = np.empty((len(asked), 0), np.int32), np.empty((len(asked), 0), np.float32)
    ids_TK, logp_TK = merge_support(asked[:, given_from:], logps[:, given_from:], *(top or none_T0))
    return TokenScores(
        teacher=teacher,
        sampled_logp_T=logps[:, 0].copy(),
        stop_logp_T=np.logaddexp.reduce(logps[:, 1:given_from], axis=1),
        support_ids_TK=ids_TK if ids_TK.shape[1] else None,
        support_logp_TK=logp_TK if ids_TK.shape[1] else None,
    )


def merge_support(
    given_ids_TK: np.ndarray, given_logp_TK: np.ndarray, top_ids_TK: np.ndarray, top_logp_TK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Given columns first, then the top ones; a top id that its row already gives becomes padding, as in `score_positions`."""
    repeated_TK = (top_ids_TK[:, :, None] == given_ids_TK[:, None, :]).any(-1)
    ids_TK = np.concatenate([given_ids_TK, np.where(repeated_TK, PAD_ID, top_ids_TK)], axis=1).astype(np.int32)
    logp_TK = np.concatenate([given_logp_TK, np.where(repeated_TK, -np.inf, top_logp_TK)], axis=1).astype(np.float32)
    return ids_TK, logp_TK


def cut_at_stop(token_ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids up to the first stop id, that one included; all of them where there is none."""
    ends = [position + 1 for position, token in enumerate(token_ids) if token in stop_ids]
    return tuple(token_ids[: ends[0]] if ends else token_ids)


def digest_weights(model: str) -> str:
    """SHA-256 over a model folder's safetensors files, in order of name. An id is looked up in the hub's local cache.

    Raises ValueError when the folder holds none.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"teacher model {model}: no .safetensors file in {folder}; save it with save_pretrained")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def require_stop_ids(stop_ids: tuple[int, ...], vocabulary: int) -> None:
    """Raises ValueError where the teacher has no way to stop."""
    if not any(0 <= stop_id < vocabulary for stop_id in stop_ids):
        raise ValueError(f"stop ids {stop_ids}: none is in the teacher's vocabulary of {vocabulary} tokens")
