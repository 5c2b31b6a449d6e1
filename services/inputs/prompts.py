"""Prompts in the student's own tokens: checked whole, then streamed shuffled and resumable; held-out problems likewise.

data.prompts --open_rows--> rows --open_table--> PromptTable --what fits, what is refused--> PromptStream --next(n)--> Prompt
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from opd_governor.actors.governor.reference import LengthModel
from opd_governor.actors.trajectory import BY_ENVIRONMENT, Prompt
from opd_governor.services.inputs.encode import Terms
from opd_governor.services.inputs.environments import tools_json
from opd_governor.services.inputs.outcomes import Outcomes
from opd_governor.services.inputs.refusals import NAMED, DataError, some_of
from opd_governor.services.inputs.rows import open_rows
from opd_governor.services.inputs.table import BAD_ROWS_KEPT, PromptTable, open_table
from opd_governor.services.inputs.verifiers import judge_of
from opd_governor.services.job.settings import Job, PromptSource

LOOKED_AT = 10_000
"""Answers that are judged before a run."""
MOST_BAD_SHARE = 0.01
"""Where on_bad_row is None: fewer bad rows than this are left out, more of them mean that the file is not what it should be."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the check of every row found."""

    indices: tuple[int, ...] | np.ndarray
    """Rows that are used."""
    refused: tuple[str, ...] = ()
    """One line per refused row, the first ones of them: bad rows, and prompts that leave too little of the context window."""
    num_refused: int = 0
    notes: tuple[str, ...] = ()
    """One line per kind of row that was taken otherwise than it stood."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain -> FILE:LINE of its first prompt."""
    longest_tokens: int = 0
    num_golden: int = 0
    """Prompts with a golden column."""
    golden_fits: np.ndarray | None = None
    """Per row of the table: it has a golden answer that fits into the window. None: as the table says."""


class GoldenPrompts(Sequence[Prompt]):
    """The prompts of a stream that have a golden answer, each made when it is looked at."""

    def __init__(self, stream: "PromptStream", indices: Sequence[int]) -> None:
        self._stream, self._indices = stream, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        return self._stream.at(int(self._indices[place]))


class PromptStream:
    """An endless, shuffled, resumable stream of prompts.

    The order is a function of seed and epoch alone, so a cursor of two numbers resumes it.

    >>> stream = open_prompts(job, tokenizer, context_tokens=2048)
    >>> stream.next(2)[0].index
    17
    >>> stream.state()
    {'epoch': 0, 'position': 2, 'num_prompts': 400}
    """

    def __init__(
        self,
        table: PromptTable,
        survey: Survey,
        seed: int,
        *,
        shuffle: bool = True,
        unfinished: Literal["drop", "quota", "keep"] = "keep",
    ) -> None:
        self.survey = survey
        self._table, self._seed, self._unfinished, self._is_shuffled = table, seed, unfinished, shuffle
        self._indices = np.asarray(survey.indices, np.int64)
        self._finished: dict[int, bool] = {}
        self.teacher_right: dict[int, bool] = {}
        """Prompt index -> what a verifier said of the teacher's own answer."""
        self._golden: dict[int, tuple[int, ...] | None] = {}
        self._lengths: LengthModel | None = None
        self._epoch = self._position = 0
        self._order = self._shuffle()
        self.outcomes: Outcomes | None = None
        """Where prompts are drawn by verdicts."""
        self.accept_changes = False
        """Take a cursor of other prompts: the run goes on as another one."""

    def __len__(self) -> int:
        return len(self._indices)

    def prompts(self) -> Iterator[Prompt]:
        """Every accepted prompt once, in file order."""
        return (self.at(int(index)) for index in self._indices)

    @property
    def indices(self) -> np.ndarray:
        """Of the accepted prompts, in file order."""
        return self._indices

    def has_golden(self) -> np.ndarray:
        """For each accepted prompt, in file order: whether it has a golden answer now."""
        fits = self.survey.golden_fits
        has = (self._table.num_tokens("golden_ids") >= 0 if fits is None else fits)[self._indices]
        place = {int(index): i for i, index in enumerate(self._indices)} if self._golden else {}
        for index, answer in self._golden.items():
            if index in place:
                has[place[index]] = answer is not None
        return has

    def golden(self) -> GoldenPrompts:
        """The prompts that have a golden answer, in file order."""
        return GoldenPrompts(self, self._indices[self.has_golden()])  # type: ignore[arg-type]

    def next(self, n: int, unfinished_quota: float | None = None) -> list[Prompt]:
        """The next n prompts; with policy quota at most that share of them are ones the teacher does not finish.

        Where the teacher finishes no prompt the quota is ignored, and where verdicts leave out all that is left so are they: batches are
        always full.
        """
        batch: list[Prompt] = []
        num_wanted = n if self.outcomes is None else self.outcomes.num_candidates(n)
        dropped = set() if self.outcomes is None else self.outcomes.dropped
        num_left_out = 0
        quota = 1.0 if unfinished_quota is None else unfinished_quota
        room = {"keep": n, "quota": int(quota * n), "drop": 0}[self._unfinished]
        if self._num_finished_or_new() == 0:
            room = n
        while len(batch) < num_wanted:
            index = self._advance()
            if index in dropped and num_left_out < len(self):
                num_left_out += 1
                continue
            if self._finished.get(index) is False:
                if room == 0:
                    continue
                room -= 1
            batch.append(self.at(index))
        return batch if self.outcomes is None else self.outcomes.choose(batch, n)

    def mark(
        self,
        finished: Mapping[int, bool],
        golden: Mapping[int, tuple[int, ...]] | None = None,
        refused: Sequence[int] = (),
        lengths: LengthModel | None = None,
    ) -> None:
        """Note what the golden pass learned: prompt index -> whether the teacher finished it, and its golden answer.

        `refused`: prompts whose own golden answer was not kept; it is not learned either. `lengths`: of the teacher's answers. Raises
        DataError when the policy is drop and nothing would be left.
        """
        self._finished |= finished
        self._golden |= dict.fromkeys(refused)
        self._golden |= golden or {}
        self._lengths = lengths
        if self._unfinished == "drop" and self._num_finished_or_new() == 0:
            raise DataError(
                f"data.unfinished_by_teacher: drop leaves none of {len(self)} prompts, the teacher finishes none of them; "
                "raise data.golden.max_new_tokens or set it to keep"
            )

    def digest(self, column: str = "token_ids") -> str:
        """Equal for equal prompts in equal order, wherever their file lies; or for what one of the table's other columns says of them."""
        return self._table.digest(self._indices, column)

    def state(self) -> dict[str, int]:
        """The cursor, as JSON."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a cursor. Raises DataError when the prompts are no longer as many as they were, unless `accept_changes`."""
        if state["num_prompts"] != len(self) and not self.accept_changes:
            raise DataError(
                f"data.prompts: the checkpoint's run had {state['num_prompts']} prompts, now there are {len(self)}; give the same file"
            )
        self._epoch, self._position = state["epoch"], min(state["position"], len(self))
        self._order = self._shuffle()

    def place(self, index: int) -> str:
        """FILE:LINE of a row."""
        return self._table.place(index)

    def at(self, index: int) -> Prompt:
        """The prompt of a row."""
        row = self._table[index]
        answer = row["golden_ids"]
        if answer is not None and self.survey.golden_fits is not None and not self.survey.golden_fits[index]:
            answer = None
        asked = index, len(row["token_ids"]), row["domain"]
        return Prompt(
            index=index,
            token_ids=tuple(row["token_ids"]),
            epoch=self._epoch,
            domain=row["domain"],
            answer=row["answer"],
            text=row["text"],
            teacher_token_ids=None if row["teacher_ids"] is None else tuple(row["teacher_ids"]),
            privileged_ids=tuple(row["privileged_ids"] or ()),
            teacher_weights=tuple(json.loads(row["weights"]).items()) if row["weights"] else (),
            golden_ids=self._golden.get(index, None if answer is None else tuple(answer)),
            teacher_finishes=self._finished.get(index),
            teacher_right=self.teacher_right.get(index),
            expected_tokens=self._lengths.expected_tokens(*asked) if self._lengths else None,
            longest_tokens=self._lengths.longest_tokens(*asked) if self._lengths else None,
        )

    def _num_finished_or_new(self) -> int:
        """Prompts that the teacher finishes or was not asked about. Only accepted prompts are ever marked."""
        return len(self) - sum(not done for done in self._finished.values())

    def _advance(self) -> int:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffle()
        self._position += 1
        return int(self._order[self._position - 1])

    def _shuffle(self) -> np.ndarray:
        if not self._is_shuffled:
            return self._indices
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._indices)


def open_prompts(job: Job, tokenizer: Any, context_tokens: int, teacher_tokenizers: Mapping[str, Any] | None = None) -> PromptStream:
    """The training prompts of a job, every row checked.

    `context_tokens`: the window both models can hold. A prompt that leaves less than `rollout.min_new_tokens` of it
    is refused (see `PromptStream.survey`). Raises DataError: file missing, empty, too many bad rows, or no prompt left.
    """
    source = job.data.prompts
    table = open_table(open_rows(source), tokenizer, terms_of(job, source), teacher_tokenizers)
    reward = job.objective.reward
    judge = None  # an environment may pay without an answer to hold against
    if reward is not None and reward.verifier != BY_ENVIRONMENT:
        judge = judge_of(reward.verifier, job.data.verifiers, "objective.reward.verifier")
    survey = survey_of(table, source, context_tokens, job.rollout.min_new_tokens, judge, answers_for="objective.reward")
    stream = PromptStream(table, survey, job.seed, shuffle=source.shuffle, unfinished=job.data.unfinished_by_teacher)
    if reward is not None:
        stream.outcomes = Outcomes(job.data.select)
    return stream


def terms_of(job: Job, source: PromptSource) -> Terms:
    """What of the job decides how a row is encoded."""
    rollout = job.rollout
    return Terms(source, job.teacher, rollout.loop_min_repeats, rollout.loop_min_tokens, rollout.stop_token_ids, tools_json(job))


def survey_of(
    table: PromptTable,
    source: PromptSource,
    context_tokens: int,
    min_new_tokens: int,
    judge: Callable[[str], str] | None = None,
    *,
    answers_for: str = "data.eval.path",
) -> Survey:
    """Which rows are used, and one line for each kind of row that is not, or not as it stood. Raises DataError where none is left.

    `judge`: what is wrong with an answer, in words; a row without an answer is then a bad row too. None: answers do not count.
    `answers_for`: the key of the job that asks for them.
    """
    found = table.found
    if not found.num_rows:
        raise DataError(f"{source.path}: has no rows; give it at least one prompt")
    notes = list(found.notes.lines())
    own = table.num_tokens("token_ids")
    bad, num_bad = list(found.bad), found.num_bad
    if judge is not None:
        unanswered = _unanswered(table, np.flatnonzero(own >= 0), source, judge, answers_for)
        bad += [f"{table.place(index)}: {why}" for index, why in list(unanswered.items())[:BAD_ROWS_KEPT]]
        num_bad += len(unanswered)
        own[list(unanswered)] = -1
    if num_bad:
        _judge_bad_rows(bad, num_bad, found.num_rows, source)
    seen = np.maximum(own, table.num_tokens("teacher_ids"))
    fits = context_tokens - seen >= min_new_tokens
    indices = np.flatnonzero((own >= 0) & fits)
    too_long = np.flatnonzero((own >= 0) & ~fits)
    long_lines = [
        f"{table.place(int(i))}: {seen[i]} tokens leave {context_tokens - seen[i]} of {context_tokens}" for i in too_long[: max(NAMED, 20)]
    ]
    if not len(indices):
        lines = [*bad, describe_refusals(long_lines, min_new_tokens, len(too_long))] if long_lines else bad
        raise DataError(f"{some_of(lines, num_bad + bool(long_lines))}; no prompt is left")
    golden = table.num_tokens("golden_ids")
    golden_fits = (golden >= 0) & (seen + golden <= context_tokens)
    if num_dropped := int(((golden >= 0) & (own >= 0) & fits & ~golden_fits).sum()):
        notes.append(f"{num_dropped} golden answers do not fit into the {context_tokens} tokens behind their prompt: left out")
    if num_bad:
        share = "fewer than 1 % of the rows" if source.on_bad_row is None else "on_bad_row is refuse"
        notes.append(f"{num_bad} of {found.num_rows} rows cannot be used and are left out ({share}): {some_of(bad, num_bad)}")
    return Survey(
        indices=indices,
        refused=tuple(long_lines),
        num_refused=len(too_long),
        notes=tuple(notes),
        domains=table.domains(indices),
        longest_tokens=int(seen[indices].max()),
        num_golden=int(golden_fits[indices].sum()),
        golden_fits=golden_fits,
    )


def _unanswered(
    table: PromptTable, indices: np.ndarray, source: PromptSource, judge: Callable[[str], str], answers_for: str
) -> dict[int, str]:
    """Rows without an answer that a response could be held against -> why. Of many answers the first are judged."""
    absent = f"no column {source.answer_column!r} to verify against; add it, set answer_column or unset {answers_for}"
    answers, found = table.answers(), {}
    for place, index in enumerate(map(int, indices)):
        if answers[index] is None:
            found[index] = absent
        elif place < LOOKED_AT and (why := judge(str(answers[index]))):
            found[index] = why
    return found


def _judge_bad_rows(bad: Sequence[str], num_bad: int, num_rows: int, source: PromptSource) -> None:
    if source.on_bad_row == "refuse" or (source.on_bad_row is None and num_bad < MOST_BAD_SHARE * num_rows):
        return
    if num_bad == 1:
        others = "" if num_rows == 1 else f" (1 of {num_rows} rows; on_bad_row: refuse leaves such rows out)"
        raise DataError(f"{bad[0]}{others}")
    raise DataError(f"{bad[0]} ({num_bad} of {num_rows} rows cannot be used; on_bad_row: refuse leaves them out)")


def describe_refusals(refused: Sequence[str], min_new_tokens: int, total: int | None = None) -> str:
    """One line: the first few refused prompts by line, the others counted."""
    return f"{some_of(refused, total)}: refused, rollout.min_new_tokens is {min_new_tokens}; shorten the prompts or lower it"


@dataclass(frozen=True, slots=True)
class Problems:
    """Held-out problems, and what was refused of them."""

    prompts: tuple[Prompt, ...]
    survey: Survey
    place: Callable[[int], str]
    """FILE:LINE of a prompt by its index."""


def open_problems(job: Job, tokenizer: Any, context_tokens: int) -> Problems:
    """Held-out prompts, each with an answer to verify against, read and refused as the training prompts are.

    A row without an answer that the verifier can judge by is a bad row, unless the environment judges. Raises JobError for a verifier
    that is none, and DataError as `open_prompts` does.
    """
    assert job.data.eval.path is not None
    by_environment = job.data.eval.verifier == BY_ENVIRONMENT
    judge = None if by_environment else judge_of(job.data.eval.verifier, job.data.verifiers)
    source = job.data.eval.source(job.data.prompts)
    try:
        table = open_table(open_rows(source), tokenizer, Terms(source, tools=tools_json(job)))
        survey = survey_of(table, source, context_tokens, job.rollout.min_new_tokens, judge)
    except DataError as error:
        raise DataError(str(error).replace("data.prompts.", "data.eval.")) from None  # the keys that say how these rows are read
    return Problems(tuple(PromptStream(table, survey, job.seed, shuffle=False).prompts()), survey, table.place)
