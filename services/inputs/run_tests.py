"""Run solution.py and then tests.py of the working folder, in this process, without network and within limits.

A script of its own, started by `unit_tests`.

stdin: {"memory_mib", "timeout_s", "token"} --> the token on stdout where nothing raised

The token tells passing tests from code that ends the process early. It is a guard against shortcuts of a model, not against an attacker:
code that looks for it in memory finds it, and it may read and write what the run's user may.
"""

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys

NO_NETWORK_EXIT = 97
"""Exit code where the kernel does not let the network be cut off."""
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Machine -> its number for the kernel's audit, and that of the system call socket."""
IO_URING_SETUP = 425
FOREIGN_CALLS = 0x40000000
"""From here on x86_64 has a second set of numbers for the same calls."""


def cut_off_network() -> bool:
    """No socket can be made by this process and those it starts, for good: a seccomp filter. False where the kernel has none.

    Pairs of connected sockets, which event loops need, are still there.
    """
    if platform.machine() not in ARCHITECTURES:
        return False
    architecture, socket = ARCHITECTURES[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000
    program = [  # (what, jump if true, jump if not, number)
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the call
        (at_least, 2, 0, FOREIGN_CALLS),
        (equal, 1, 0, socket),
        (equal, 0, 1, IO_URING_SETUP),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    described = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    return libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0 and libc.prctl(seccomp, by_filter, described, 0, 0) == 0


def limit(memory_mib: int, timeout_s: float) -> None:
    """Memory, seconds of CPU, size of files; and an end with the process that started this one."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mib << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(timeout_s) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory_mib << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent = 1
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    task = json.load(sys.stdin)
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    limit(task["memory_mib"], task["timeout_s"])
    if not cut_off_network():
        os._exit(NO_NETWORK_EXIT)
    names = runpy.run_path("solution.py", run_name="solution")
    runpy.run_path("tests.py", init_globals=names, run_name="tests")
    os.write(answers, task["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
