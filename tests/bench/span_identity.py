"""The scores of the student's tokens, added up, against the log-prob of the teacher's own tokenisation.

On random strings, for every pair of tokenizer kinds.

    python -m tests.bench.span_identity [--strings 100000]

The teacher is a bigram table over its vocabulary, so that its log-probs cost nothing; the spans, sums and shares are the real ones.
"""

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from opd_governor.actors.teacher.byte_tokens import ByteTokenizer
from opd_governor.actors.teacher.cross_tokenizer import CrossTokenizerScorer, Vocabularies
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.trajectory import TokenScores
from tests.teacher import zoo

SEED = 0
KINDS = {
    "byte level": zoo.byte_level(),
    "coarse byte level": zoo.byte_level(900),
    "SentencePiece": zoo.sentencepiece(gemma=True),
    "Unigram": zoo.metaspace(),
}
CHARACTERS = [*map(chr, range(32, 127)), *"\n\t0123456789 äöüßé½²∑老师教学生日本語の😀👩👧\u200d\u0301"]


class Bigrams:
    """log p(token | the one before), seeded; the last id of the vocabulary is the only stop."""

    def __init__(self, size: int) -> None:
        logits = np.random.default_rng(SEED).normal(size=(size, size)) * 2
        self.logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        return [self.one(request) for request in requests]

    def one(self, request: ScoreRequest) -> TokenScores:
        ids = np.array([request.prompt_token_ids[-1], *request.token_ids])
        logp_TV = self.logp[ids[:-1]]
        top_TK = np.argpartition(-logp_TV, request.top_k, axis=1)[:, : request.top_k].astype(np.int32)
        top_logp_TK = np.take_along_axis(logp_TV, top_TK.astype(np.int64), axis=1)
        return TokenScores("bigrams", self.logp[ids[:-1], ids[1:]], logp_TV[:, -1], top_TK, top_logp_TK)

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        raise NotImplementedError("a table that scores")


def random_text(rng: random.Random) -> str:
    """Pieces of real text, where tokens are long and cut differently, between characters from anywhere."""
    pieces = []
    for _ in range(rng.randint(0, 8)):
        source = rng.choice(zoo.CORPUS)
        start = rng.randrange(len(source))
        pieces.append(source[start : start + rng.randint(1, 12)] if rng.random() < 0.7 else rng.choice(CHARACTERS))
    return "".join(pieces)


def largest_gap(student: str, teacher: str, num_strings: int) -> tuple[float, float]:
    """Nats over whole texts, stop included; and spans per token of the student."""
    ours, theirs = ByteTokenizer(KINDS[student]), ByteTokenizer(KINDS[teacher])
    stop, their_stop = ours.specials[zoo.STOP], theirs.specials[zoo.STOP]
    rng, gap, num_spans, num_tokens = random.Random(SEED), 0.0, 0, 0
    bigrams = Bigrams(theirs.size)
    bigrams.logp[:, [their_stop, -1]] = bigrams.logp[:, [-1, their_stop]]  # the stop, wherever it stands
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in (("student", KINDS[student]), ("teacher", KINDS[teacher])):
            tokenizer.save_pretrained(Path(folder) / name)
        names = str(Path(folder) / "student"), str(Path(folder) / "teacher")
        cross = CrossTokenizerScorer(bigrams, Vocabularies(*names, (stop,), (their_stop,), stop, None))
    for _ in range(num_strings):
        text = random_text(rng)
        (scores,) = cross.score([ScoreRequest((5,), (*ours.encode(text), stop))])
        assert scores is not None
        ids = np.array([5, *theirs.encode(text)])
        whole = bigrams.logp[ids[:-1], ids[1:]].sum() + bigrams.logp[ids[-1], -1]
        gap = max(gap, abs(float(scores.sampled_logp_T.sum(dtype=np.float64)) - whole))
        num_spans, num_tokens = num_spans + int(scores.span_T[-1]) + 1, num_tokens + len(scores.span_T)
    return gap, num_spans / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=100_000, help="of all pairs together")
    num_strings = -(-parser.parse_args().strings // (len(KINDS) * (len(KINDS) - 1)))
    print(f"python {platform.python_version()}, tokenizers {tokenizers.__version__}, transformers {transformers.__version__}, seed {SEED}")
    print("| student | teacher | strings | largest gap, nats | spans per token | seconds |\n|---|---|---|---|---|---|")
    for student, teacher in product(KINDS, KINDS):
        if student != teacher:
            started = time.monotonic()
            gap, spans = largest_gap(student, teacher, num_strings)
            print(f"| {student} | {teacher} | {num_strings} | {gap:.1e} | {spans:.2f} | {time.monotonic() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
