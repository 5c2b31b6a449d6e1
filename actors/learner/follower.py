"""The weights of a teacher that follows the student: kept beside the student, copied or averaged after its steps (pure torch).

    student --every N steps, or a share of each step--> Follower --bytes of a safetensors file--> teacher actors
                                                            |
                                                            +--> teacher.safetensors of a checkpoint

Sources: a mean teacher, arXiv 1703.01780; a self-teacher copied or averaged on the way, arXiv 2601.20802.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from opd_governor.actors.learner.sharding import scatter
from opd_governor.actors.settings import FollowSettings

Named = Iterable[tuple[str, Tensor]]


class Follower:
    """One float32 copy of the student's weights, cut over ranks as these are."""

    def __init__(self, settings: FollowSettings, weights: Named) -> None:
        """`weights`: the student's, by the names of its file; the teacher begins with them."""
        self._settings = settings
        self._weights = {name: tensor.detach().clone() for name, tensor in weights}
        self.version = 0
        """The student's version at the last change; 0: as it came."""

    @torch.no_grad()
    def after_step(self, weights: Named, weight_version: int) -> None:
        """Follow a step of the student's, which brought `weight_version`."""
        every_steps, ema = self._settings.every_steps, self._settings.ema
        if every_steps is not None and weight_version % every_steps:
            return
        for name, tensor in weights:
            own = self._weights[name]
            if ema is None or not tensor.is_floating_point():
                own.copy_(tensor)
            else:
                own.mul_(ema).add_(tensor, alpha=1 - ema)
        self.version = weight_version

    def weights(self) -> Named:
        """By the names of the student's file; this rank's part."""
        return self._weights.items()

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Tensor], version: int) -> None:
        """Take whole tensors, equal on all ranks."""
        for name, own in self._weights.items():
            own.copy_(scatter(stored[name], own))
        self.version = version
