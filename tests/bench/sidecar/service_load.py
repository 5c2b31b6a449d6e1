"""Many runs posting once a second to a real `opd govern`; prints what was answered, lost, and how late.

python -m tests.bench.sidecar.service_load [--runs 1000] [--seconds 60]
"""

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import psutil

from tests.services.sidecar.service import TOKEN, govern


class Load:
    """Raw sockets: a client library would cost as much as the service."""

    def __init__(self, port: int, num_runs: int, seconds: int) -> None:
        self._port, self._num_runs, self._seconds = port, num_runs, seconds
        self.lost: list[str] = []
        self.latencies_s: list[float] = []

    async def all(self) -> None:
        await asyncio.gather(*(self._one(index) for index in range(self._num_runs)))

    async def _one(self, index: int) -> None:
        rng = random.Random(index)
        await asyncio.sleep(index / self._num_runs)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        began_s = time.monotonic()
        for step in range(1, self._seconds + 1):
            lengths = [rng.randint(20, 60) for _ in range(32)]
            body = json.dumps(
                {"step": step, "lengths": lengths, "finish_reasons": ["stop"] * 32, "cap_tokens": 192, "kl_nats": 0.1}
            ).encode()
            head = f"POST /v1/runs/r{index}/steps HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sent_s = time.monotonic()
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            size = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            document = json.loads(await reader.readexactly(size))
            if b" 200 " not in answer[:20] or document["step"] != step:
                self.lost.append(f"r{index} step {step}: {document}")
            self.latencies_s.append(time.monotonic() - sent_s)
            await asyncio.sleep(max(0.0, began_s + step - time.monotonic()))
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, govern(Path(scratch)) as (url, process):
        load = Load(int(url.rpartition(":")[2]), arguments.runs, arguments.seconds)
        before = psutil.Process(process.pid).cpu_times()
        began_s = time.monotonic()
        asyncio.run(load.all())
        took_s = time.monotonic() - began_s
        after = psutil.Process(process.pid).cpu_times()
        kept = sum(len(path.read_text().splitlines()) for path in Path(scratch).glob("out/runs/*/decisions.jsonl"))
    late = sorted(load.latencies_s)
    cpu_s = after.user + after.system - before.user - before.system
    print(
        f"{arguments.runs} runs x {arguments.seconds} steps: {len(late)} answered, {len(load.lost)} wrong, {kept} decisions kept, "
        f"{took_s:.1f} s; latency p50 {1e3 * late[len(late) // 2]:.1f} ms, p99 {1e3 * late[int(len(late) * 0.99)]:.1f} ms, "
        f"longest {1e3 * late[-1]:.0f} ms; the service took {cpu_s:.1f} s of one core; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}"
    )
    for text in load.lost[:5]:
        print(text)


if __name__ == "__main__":
    main()
