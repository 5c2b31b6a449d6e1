"""Logs as trainers write them, made of one made-up run whose figures tests choose."""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

TOKENS = "train/agg/all/num_output_tokens"
Point = tuple[float, float, float]
"""(mean length, longest answer, truncation) of one step."""


def collapse(num_steps: int = 60, cap: float = 512.0) -> list[Point]:
    """Healthy for half the run, then up to the cap."""
    points = []
    for step in range(num_steps):
        share = min(1.0, max(0.0, (step - num_steps / 2) / 10))
        wobble = 3.0 * ((step * 7) % 5 - 2)
        points.append((100 + wobble + share * (cap - 110), min(cap, 200 + wobble + share * cap), round(share, 3)))
    return points


def steady(num_steps: int = 60) -> list[Point]:
    return [(100 + 3.0 * ((step * 7) % 5 - 2), 200.0 + (step * 13) % 50, 0.0) for step in range(num_steps)]


def trl_rows(points: Sequence[Point]) -> list[dict[str, object]]:
    return [
        {
            "completions/mean_length": mean,
            "completions/max_length": longest,
            "completions/clipped_ratio": cut,
            "completions/mean_terminated_length": mean * 0.8 if cut < 1 else 0.0,
            "clip_ratio/high_max": 0.9,
            "eval_completions/mean_length": 3.0,
            "entropy": 0.3,
            "learning_rate": 1e-6,
            "loss": 0.1,
            "epoch": step / 10,
            "step": step,
        }
        for step, (mean, longest, cut) in enumerate(points, start=1)
    ]


def write_all(folder: Path, points: Sequence[Point]) -> dict[str, Path]:
    """The same run as every trainer would log it: name -> file. Names of files say nothing about their format."""
    rows = trl_rows(points)
    texts = {
        "trl": json.dumps({"best_metric": None, "log_history": rows}, indent=2),
        "trl lines": "".join(json.dumps(row) + "\n" for row in rows),
        "trl printed": "".join(f" 12%|#| {row['step']}/60\r{ {k: str(v) for k, v in row.items() if k != 'step'} }\n" for row in rows),
        "wandb csv": _csv(rows),
        "columns": json.dumps({key: [row[key] for row in rows] for key in rows[0]}),
        "verl console": "".join(_verl(step, *point) for step, point in enumerate(points, start=1)),
        "verl file": _lines(
            {"step": step, "data": {"response_length/mean": mean, "response_length/max": top, "response_length/clip_ratio": max(cut, 0.02)}}
            for step, (mean, top, cut) in enumerate(points, start=1)
        ),
        "nemo-rl console": "".join(_nemo(step, *point) for step, point in enumerate(points, start=1)),
        "prime-rl": _lines(
            {"step": step, f"{TOKENS}/mean": mean, f"{TOKENS}/max": top, "train/agg/all/is_truncated/mean": cut}
            for step, (mean, top, cut) in enumerate(points, start=1)
        ),
        "slime": "".join(
            f"INFO rollout.py:88 - perf {step}: {{'rollout/response_len/mean': {mean}, 'rollout/response_len/max': {top}, "
            f"'rollout/truncated_ratio': {cut}, 'rollout/repetition_frac': 0.0}}\n"
            for step, (mean, top, cut) in enumerate(points)
        ),
        "openrlhf": _lines(
            {"train/global_step": step, "rollout/response_length_mean": mean, "rollout/truncated_rate": cut, "actor_lr": 1e-6}
            for step, (mean, _, cut) in enumerate(points)
        ),
        "ours": _lines(
            {"step": step, "length_mean": mean, "length_max": top, "truncation": cut, "loops": 0.0, "cap_tokens": 512, "lengths": [1, 2]}
            for step, (mean, top, cut) in enumerate(points)
        ),
        "prime-rl printed": "".join(
            f"12:00 INFO Step {step} | Time: 3.2s | Reward: 0.5 | Seq. Length: {mean:.1f} tokens/sample | Truncation {100 * cut:.1f}%\n"
            for step, (mean, _, cut) in enumerate(points)
        ),
        "logfmt": "".join(
            f"ts=2026-11-01 step={step} loss=0.3 mean_length={mean} max_length={top} truncation_rate={cut} lr=1e-06\n"
            for step, (mean, top, cut) in enumerate(points)
        ),
        "somebody's own": _lines(
            {"global_step": step, "mean_length": mean, "truncation_rate": cut} for step, (mean, _, cut) in enumerate(points)
        ),
    }  # fmt: skip
    paths = {}
    for number, (name, text) in enumerate(texts.items()):
        paths[name] = folder / f"log-{number}"
        paths[name].write_text(text)
    paths["utf-16"] = folder / "log-wide"
    paths["utf-16"].write_text(texts["trl lines"], encoding="utf-16")
    paths["tensorboard"] = folder / "log-events"
    paths["tensorboard"].write_bytes(_events(points))
    return paths


def _lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _csv(rows: list[dict[str, object]]) -> str:
    names = ["completions/mean_length", "completions/clipped_ratio", "completions/max_length"]
    head = '"Step",' + ",".join(f'"run-1 - train/{name}","run-1 - train/{name}__MIN","run-1 - train/{name}__MAX"' for name in names)
    lines = [f'"{row["step"]}",' + ",".join(f'"{row[name]}","{row[name]}","{row[name]}"' for name in names) for row in rows]
    return "\n".join([head, *lines]) + "\n"


def _verl(step: int, mean: float, longest: float, cut: float) -> str:
    pairs = f"response_length/mean:{mean} - response_length/max:np.float64({longest}) - response_length/clip_ratio:{max(cut, 0.02)}"
    return f"\x1b[36m(TaskRunner pid=7)\x1b[0m step:{step} - actor/entropy:0.3 - {pairs} - val-core/x/mean@1:0.5\nsome other line\n"


def _nemo(step: int, mean: float, longest: float, cut: float) -> str:
    return (
        f"========== Step {step}/60 ==========\n  • Loss: 0.0312\n  • Mean Generation Length: {mean:.4f}\n"
        f"  • Max Generation Length: {longest:.1f}\n  • Truncation Rate: {cut}\n"
    )


def _events(points: Sequence[Point]) -> bytes:
    """TensorBoard's own framing: length, crc, Event, crc; nobody here checks a crc."""
    data = _record(b"\x09" + struct.pack("<d", 1.0) + b"\x1a\x0dbrain.Event:2")
    for step, (mean, longest, cut) in enumerate(points, start=1):
        for tag, value in (("mean_length", mean), ("max_length", longest), ("clipped_ratio", cut)):
            name = f"train/completions/{tag}".encode()
            scalar = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", value)
            summary = b"\x0a" + bytes([len(scalar)]) + scalar
            data += _record(b"\x09" + struct.pack("<d", 2.0) + b"\x10" + _varint(step) + b"\x2a" + bytes([len(summary)]) + summary)
    return data


def _record(event: bytes) -> bytes:
    return struct.pack("<Q", len(event)) + bytes(4) + event + bytes(4)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
