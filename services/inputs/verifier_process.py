"""The process that one verifier runs in: responses in, scores out, one line of JSON each. Started by the run, `python -m`.

stdin: {"response", "answer"} --> {"score"} or {"reason", "trouble"} on stdout; the first line says {"ready": true} or {"trouble"}

What the verifier prints goes nowhere. The process ends when its stdin does, whatever the verifier does then.
"""

import json
import os
import queue
import resource
import sys
import threading
from dataclasses import asdict
from typing import Any

from opd_governor.actors.extensions import load_extensions
from opd_governor.services.inputs.verdicts import judge, limits
from opd_governor.services.inputs.verifiers import load_verifier


def main(spec: str, field: str = "data.eval.verifier") -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        load_extensions()
        verify = load_verifier(spec, field)
    except Exception as error:
        say({"trouble": str(error)})
        return
    _limit_memory(limits()[1])
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    say({"ready": True})
    while True:
        task = json.loads(asked.get())
        say(asdict(judge(verify, task["response"], task["answer"])))


def _read(asked: "queue.SimpleQueue[str]") -> None:
    """In a thread beside the verifier, which keeps the main one because packages set alarms there: the end of stdin ends the process."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _limit_memory(more_mib: int) -> None:
    """Beyond what the loaded verifier has."""
    with open("/proc/self/status") as status:
        data_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, ((data_kib << 10) + (more_mib << 20),) * 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
