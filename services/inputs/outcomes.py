"""How often the student was right on each prompt, and which prompts are drawn for it.

verdicts of a step --note--> {prompt: (judged, right)} --dropped, choose--> PromptStream
"""

from collections.abc import Iterable, Mapping, Sequence

from opd_governor.actors.trajectory import PASS, Prompt, Trajectory
from opd_governor.services.job.settings import SelectSettings


class Outcomes:
    """By prompt: samples judged and samples right, over all epochs. A function of the steps learned, so a resumed run has the same."""

    def __init__(self, settings: SelectSettings) -> None:
        self._settings = settings
        self._counts: dict[int, tuple[int, int]] = {}
        self.dropped: set[int] = set()
        """Prompts that have nothing more to teach."""

    def note(self, trajectories: Iterable[Trajectory]) -> None:
        """A step's verdicts; rollouts without one say nothing."""
        for trajectory in trajectories:
            if trajectory.reward is not None:
                judged, right = self._counts.get(trajectory.prompt.index, (0, 0))
                self._set(trajectory.prompt.index, judged + 1, right + (trajectory.reward >= PASS))

    def pass_rate(self, index: int) -> float | None:
        """None: never judged."""
        judged, right = self._counts.get(index, (0, 0))
        return right / judged if judged else None

    def num_candidates(self, n: int) -> int:
        """Prompts to look at for n."""
        return 2 * n if self._settings.prefer == "mixed" else n

    def choose(self, prompts: Sequence[Prompt], n: int) -> list[Prompt]:
        """The n whose pass rate is nearest to one half, in their order; one that was never judged is as near as can be."""
        if len(prompts) <= n:
            return list(prompts)
        rates = [self.pass_rate(prompt.index) for prompt in prompts]
        far = [0.0 if rate is None else abs(rate - 0.5) for rate in rates]
        return [prompts[place] for place in sorted(sorted(range(len(prompts)), key=far.__getitem__)[:n])]

    def state(self) -> dict[str, list[int]]:
        """Of a checkpoint, as JSON."""
        return {str(index): list(counts) for index, counts in self._counts.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Back to a checkpoint."""
        self._counts, self.dropped = {}, set()
        for index, (judged, right) in state.items():
            self._set(int(index), judged, right)

    def _set(self, index: int, judged: int, right: int) -> None:
        self._counts[index] = judged, right
        easy, hard = self._settings.drop_always_right, self._settings.drop_always_wrong
        always_right = easy is not None and right == judged >= easy
        always_wrong = hard is not None and right == 0 and judged >= hard
        (self.dropped.add if always_right or always_wrong else self.dropped.discard)(index)
