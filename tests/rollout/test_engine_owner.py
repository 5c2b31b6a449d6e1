"""An engine's process ends when the actor that started it ends, in whatever way."""

import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.integration
"""For the import of vllm, which takes many seconds."""

PROGRAM = """
import os, subprocess, sys, time
os.environ[sys.argv[1]] = str(os.getpid())
engine = "import opd_governor.actors.rollout.worker, time; print('up', flush=True); time.sleep(300)"
process = subprocess.Popen([sys.executable, "-c", engine], stdout=subprocess.PIPE, start_new_session=True)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(300)
"""


def test_an_engine_whose_actor_is_killed_ends_too() -> None:
    from opd_governor.actors.rollout.engine import OWNER

    with subprocess.Popen([sys.executable, "-c", PROGRAM, OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        engine = psutil.Process(int(owner.stdout.readline()))
        assert engine.is_running()
        owner.kill()
        assert psutil.wait_procs([engine], timeout=20)[1] == []
