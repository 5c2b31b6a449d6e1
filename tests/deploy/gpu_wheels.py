"""The Python source of vLLM's GPU wheels, fetched once and kept under .cache: what this project calls there can be held against it
on any machine.

    python tests/deploy/gpu_wheels.py      # fetches both ends of the range (330 MB each; 60 MB each are kept)
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.32.0", "0.33.0")
"""Both ends of what pyproject.toml allows."""


def source(version: str) -> Path:
    """A folder that holds the package `vllm` of this version, *.py alone. Raises CalledProcessError where the registry has it not."""
    kept = ROOT / ".cache" / "vllm-gpu" / version
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
        subprocess.run([*command, f"vllm=={version}"], check=True, capture_output=True, text=True)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        shutil.move(unpacked, kept)
    return kept


if __name__ == "__main__":
    for fetched in VERSIONS:
        print(source(fetched))
