"""One rank's end of a broadcast when something fails in the middle: whose fault it is told as, and that no other rank is left waiting."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opd_governor.actors.deadlines import TransferError
from opd_governor.actors.learner import transfer
from opd_governor.actors.learner.transfer import Sender


class Model(torch.nn.Module):
    """Four weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))
        self.head = torch.nn.Linear(2, 3, bias=False)

    def named_non_persistent_buffers(self) -> Iterator[Any]:
        return iter(())

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def get_input_embeddings(self) -> torch.nn.Linear:
        return self.head


class Trainer:
    """vLLM's trainer engine that takes `taken` weights of its source and then fails."""

    model_update_group = None
    closed = False

    def __init__(self, source: Any, taken: int | None, error: Exception | None) -> None:
        self.source, self.taken, self.error = source, taken, error

    def send_weights(self) -> None:
        for place, _ in enumerate(self.source.iter_full() if self.taken != 0 else ()):
            if self.taken is not None and place + 1 == self.taken:
                break
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        self.closed = True


def sender(monkeypatch: pytest.MonkeyPatch, taken: int | None, error: Exception | None) -> tuple[Sender, list[str]]:
    """A sender, and the names of the weights as they are gathered."""
    gathered: list[str] = []

    class Counted(transfer.Outgoing):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().__iter__():
                gathered.append(name)
                yield name, tensor

    monkeypatch.setattr(transfer, "Outgoing", Counted)
    monkeypatch.setattr(
        transfer.WeightTransferTrainerFactory, "trainer_init", lambda init_info, *, client, source: Trainer(source, taken, error)
    )
    return Sender("ipc", Model(), torch.float32, [], 1), gathered


@pytest.mark.parametrize("taken", [0, 1, 3, None])
def test_an_engine_s_failure_is_told_as_such_and_the_round_is_gathered_to_its_end(
    taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, gathered = sender(monkeypatch, taken, RuntimeError("actor died"))
    with pytest.raises(TransferError, match="RuntimeError: actor died"):
        made.send()
    assert len(gathered) == len(set(gathered)) == 5, "other ranks gather every weight once"
    made.close()
    assert made._trainer is not None
    assert made._trainer.closed  # type: ignore[attr-defined]


def test_a_rank_that_goes_while_weights_are_gathered_is_the_learner_s_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("connection closed by peer")

    made, _ = sender(monkeypatch, None, None)
    monkeypatch.setattr("opd_governor.actors.learner.outgoing.whole", broken)
    with pytest.raises(RuntimeError, match="connection closed by peer") as raised:
        made.send()
    assert not isinstance(raised.value, TransferError)


def test_round_after_round_goes_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made, gathered = sender(monkeypatch, None, None)
    made.send()
    made.send()
    assert len(gathered) == 10
