"""A verifier of the job's own, tried on one answer before a run: in the process that it will be judged in, never in this one.

spec, answer --> verifier_process --> what is wrong, in words, or nothing
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

from opd_governor.services.inputs.verdicts import MEMORY_VARIABLE, TIMEOUT_VARIABLE, Verdict
from opd_governor.services.job.settings import VerifierProcesses

PROCESS = "opd_governor.services.inputs.verifier_process"
START_S = 120.0
"""For a process to load the verifier."""


def trouble_of(spec: str, field: str, answer: str, settings: VerifierProcesses) -> str:
    """What is wrong, naming the job's key `field`; empty where the verifier gives a score. Whatever it does costs its own process alone."""
    limits = {TIMEOUT_VARIABLE: str(settings.timeout_s), MEMORY_VARIABLE: str(settings.memory_mib)}
    command = [sys.executable, "-m", PROCESS, spec, field]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | limits, start_new_session=True
    )
    try:
        began = _said(process, START_S)
        if isinstance(began, str) or "ready" not in began:
            return f"{field} {spec}: {began}" if isinstance(began, str) else str(began["trouble"])
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which its silence says
            process.stdin.write(json.dumps({"response": answer, "answer": answer}).encode() + b"\n")
            process.stdin.flush()
        said = _said(process, settings.timeout_s)
        on = f"{field} {spec}: on response and answer {answer[:60]!r}"
        if isinstance(said, str):
            return f"{on}: {said}"
        verdict = Verdict(**said)
        return f"{field} {spec}: on response and {verdict.trouble}" if verdict.score is None else ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started goes as well
        process.communicate()


def _said(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any] | str:
    """Its next line, or why there is none."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    if not ready:
        return f"it says nothing for {timeout_s:g} s (data.verifiers.timeout_s); make it faster, or allow it more"
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        return f"its process ended with {'signal ' if code < 0 else 'exit code '}{abs(code)}"
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError):
        return f"its process says {line[:60]!r}, which is no verdict"
