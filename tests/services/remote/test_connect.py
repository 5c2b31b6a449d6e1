"""Looking at a cluster from outside it."""

import os

import pytest

from opd_governor.services.remote.jobs import connect
from opd_governor.services.remote.steer import RemoteError


def test_looking_at_another_cluster_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(RemoteError, match=r"^--address http://127\.0\.0\.1:9: no Ray cluster answers"):
        connect("http://127.0.0.1:9")
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
