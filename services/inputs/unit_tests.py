"""Code judged by its tests: the verifier `unit-tests`.

response --last fenced block--> code + the answer's tests --run_tests, in a process without network--> all passed or not
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from opd_governor.services.inputs.run_tests import NO_NETWORK_EXIT
from opd_governor.services.inputs.verdicts import limits

FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHARE = 0.8
"""Of the verifier's time that the tests have: code that hangs is wrong, a verifier that hangs is a failure of its own."""


def last_block(response: str) -> str:
    """The last fenced block of a response; all of it where it has none.

    >>> last_block("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = FENCED.findall(response)
    return str(blocks[-1]) if blocks else response


def passes(response: str, tests: str) -> bool:
    """Whether the tests run to their end on the response's code. Raises RuntimeError where this machine cannot cut the network off."""
    timeout_s, memory_mib = limits()
    token, runner = secrets.token_hex(16), Path(__file__).with_name("run_tests.py")
    task = {"memory_mib": memory_mib, "timeout_s": timeout_s * SHARE, "token": token}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("solution.py", last_block(response)), ("tests.py", tests)):
            Path(folder, name).write_text(text, errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", str(runner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(task).encode(), timeout_s * SHARE)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the code has started goes as well
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    if process.returncode == NO_NETWORK_EXIT:
        raise RuntimeError("this machine cannot keep code from the network (no seccomp filters); run it where the kernel has them")
    return said == token.encode()
