"""What a run reads before any actor starts: models, tokenizer, prompts, held-out problems.

job --> Models, tokenizer --> PromptStream, problems --> Sources
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.bridge import Bridge
from opd_governor.services.inputs.environments import open_environment
from opd_governor.services.inputs.prompts import PromptStream, Survey, describe_refusals, open_problems, open_prompts
from opd_governor.services.inputs.resolve import Models, resolve, teacher_tokenizers
from opd_governor.services.job.settings import Job
from opd_governor.services.run.demonstrations import Demonstrations, demonstrations_of


@dataclass(frozen=True, slots=True)
class Sources:
    """All of it, read and valid."""

    models: Models
    tokenizer: Any
    """The student's."""
    stream: PromptStream
    problems: tuple[Prompt, ...]
    """Held out; empty: no evaluation."""
    demonstrations: Demonstrations | None = None
    bridge: Bridge | None = None
    """Between turns; None: rollouts have one."""
    notes: tuple[str, ...] = ()
    """Rows that were left out or taken otherwise than they stood, one line a kind."""

    @classmethod
    def read(cls, job: Job) -> "Sources":
        """Raises JobError (DataError) for whatever is wrong with them."""
        models, tokenizer = resolve(job)
        stream = open_prompts(job, tokenizer, models.context_tokens, teacher_tokenizers(job, models))
        sources = cls(models, tokenizer, stream, (), bridge=open_environment(job, tokenizer))
        sources = replace(sources, demonstrations=demonstrations_of(job, models, tokenizer, sources.decode))
        if not job.data.eval.path:
            return replace(sources, notes=told("data.prompts", stream.survey, job))
        held_out = open_problems(job, tokenizer, models.context_tokens)
        notes = told("data.prompts", stream.survey, job) + told("data.eval", held_out.survey, job)
        return replace(sources, problems=held_out.prompts, notes=notes)

    def decode(self, token_ids: Sequence[int]) -> str:
        """A response as text, without the stop id at its end."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.models.stop_ids else token_ids
        return str(self.tokenizer.decode(ids))

    def ordinary_text(self, num_tokens: int) -> list[int]:
        """Ids of ordinary text: the first prompts, one after the other, no more than the window holds."""
        ids = itertools.chain.from_iterable(prompt.token_ids for prompt in itertools.cycle(self.stream.prompts()))
        return list(itertools.islice(ids, min(num_tokens, self.models.context_tokens - 1)))


def told(where: str, survey: Survey, job: Job) -> tuple[str, ...]:
    """What a person should know about the rows."""
    notes = list(survey.notes)
    if survey.num_refused:
        notes.append(describe_refusals(survey.refused, job.rollout.min_new_tokens, survey.num_refused))
    return tuple(f"{where}: {note}" for note in notes)
