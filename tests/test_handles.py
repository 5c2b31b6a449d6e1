"""A handle of shared GPU memory survives a serialiser that refuses classes."""

from typing import Any

import pytest
import torch
from torch.storage import TypedStorage
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from opd_governor.actors.handles import each_handle, plain, rebuilt

HANDLE = (
    torch.Tensor, torch.Size([3, 4]), (4, 1), 0, TypedStorage, torch.bfloat16, 0,
    b"\x00\xffcuda", 96, 512, False, b"counter", 8, b"event", True,
)  # fmt: skip
"""What torch's reduce_tensor makes of a tensor on a GPU."""


def travelled(update: dict[str, Any]) -> dict[str, Any]:
    """Through what vLLM puts between its front and its engine, without the switch that lets it unpickle."""
    return dict(MsgpackDecoder(dict[str, Any]).decode(MsgpackEncoder().encode(update)))


@pytest.fixture(autouse=True)
def no_insecure_serialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)


@pytest.mark.parametrize(
    "handles", [{"GPU-1": HANDLE}, [{"GPU-1": HANDLE, "GPU-2": HANDLE}, {"GPU-1": HANDLE}]], ids=["packed", "by tensor"]
)
def test_plain_handles_pass_where_classes_do_not(handles: Any) -> None:
    with pytest.raises(Exception, match=r"insecure|INSECURE|not serializable"):
        travelled({"ipc_handles": handles})
    arrived = travelled({"ipc_handles": each_handle(handles, plain)})
    assert each_handle(arrived["ipc_handles"], rebuilt) == handles


@pytest.mark.parametrize(("place", "value"), [(0, torch.nn.Parameter), (4, torch.UntypedStorage), (7, object())])
def test_a_handle_of_another_form_is_refused(place: int, value: Any) -> None:
    with pytest.raises(ValueError, match="a handle "):
        plain((*HANDLE[:place], value, *HANDLE[place + 1 :]))


def test_a_dtype_that_is_none_is_refused() -> None:
    fields = plain(HANDLE)
    fields[5] = "nn"
    with pytest.raises(ValueError, match="dtype 'nn'"):
        rebuilt(fields)
