"""A right answer of the student's own, shown to the teacher of its other answers to the same prompt.

rollouts of a step --verify--> right ones --the shortest other one of the prompt--> the prompt as the teacher sees it

Source: self-distillation policy optimisation, arXiv 2601.20802. The student's prompt stays as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_governor.actors.teacher.settings import DEMONSTRATION
from opd_governor.actors.trajectory import Prompt, Trajectory
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.inputs.verdicts import Verifier, judge
from opd_governor.services.inputs.verifiers import load_verifier
from opd_governor.services.job.settings import Job, JobError


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """`before_ids` + the right answer without its stop + `after_ids` stand before the teacher's view, behind a BOS."""

    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    verify: Verifier
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    context_tokens: int
    bos_id: int | None = None

    def prompts(self, trajectories: Sequence[Trajectory]) -> dict[int, Prompt]:
        """Identity of a trajectory -> its prompt as the teacher sees it; none for one without a right sibling that fits the window."""
        right: dict[tuple[int, int], list[Trajectory]] = {}
        for trajectory in trajectories:
            if self._is_right(trajectory):
                right.setdefault(_key(trajectory), []).append(trajectory)
        found = {}
        for trajectory in trajectories:
            siblings = [one for one in right.get(_key(trajectory), ()) if one.sample != trajectory.sample]
            if siblings:
                shown = min(siblings, key=lambda one: (len(one.token_ids), one.sample))
                prompt = self._with(trajectory.prompt, shown.token_ids)
                if len(prompt.teacher_token_ids or ()) + len(trajectory.token_ids) <= self.context_tokens:
                    found[id(trajectory)] = prompt
        return found

    def _is_right(self, trajectory: Trajectory) -> bool:
        answer = trajectory.prompt.answer
        if trajectory.finish_reason != "stop" or answer is None:
            return False
        return judge(self.verify, self.decode(trajectory.token_ids), answer).passed

    def _with(self, prompt: Prompt, answer_ids: tuple[int, ...]) -> Prompt:
        body = answer_ids[:-1] if answer_ids[-1] in self.stop_ids else answer_ids
        view = prompt.teacher_token_ids or prompt.token_ids
        num_bos = int(self.bos_id is not None and view[0] == self.bos_id)
        shown = (*view[:num_bos], *self.before_ids, *body, *self.after_ids, *view[num_bos:])
        return replace(prompt, teacher_token_ids=shown, privileged_ids=(*prompt.privileged_ids, *body))


def _key(trajectory: Trajectory) -> tuple[int, int]:
    return trajectory.prompt.epoch, trajectory.prompt.index


def demonstrations_of(job: Job, models: Models, tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> Demonstrations | None:
    """None where no teacher asks for any. Raises JobError where they cannot be had."""
    templates = {teacher.demonstration for teacher in job.teacher}
    if templates == {None}:
        return None
    if len(templates) > 1 or any(models.tokens):
        raise JobError("teacher.demonstration: set it alike for all teachers, whose tokens must be the student's")
    (template,) = templates
    assert template is not None
    before, _, after = template.partition(DEMONSTRATION)
    ids = [tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else () for text in (before, after)]
    verify = load_verifier(job.data.eval.verifier)
    return Demonstrations(ids[0], ids[1], verify, decode, models.stop_ids, models.context_tokens, tokenizer.bos_token_id)
