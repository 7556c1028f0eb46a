"""Every CUDA source compiles for every GPU generation that we name: no warning, no spilled registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cuda_host import toolkit

pytestmark = pytest.mark.skipif(toolkit.nvcc() is None, reason="needs nvcc")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def gencode() -> list[str]:
    """Options for those architectures that this nvcc knows (an older toolkit lacks the newest GPUs)."""
    listed = subprocess.run([toolkit.nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    wanted = [a for a in ARCHITECTURES if f"sm_{a}" in listed.split()]
    assert wanted
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]


@pytest.mark.parametrize("source", toolkit.KERNELS, ids=lambda p: p.stem)
def test_compiles_cleanly(source: Path, gencode: list[str], tmp_path: Path) -> None:
    options = "-std=c++17 -O3 -fmad=false -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v --threads 2".split()
    command = [toolkit.nvcc(), *options, *gencode, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said.lower(), said
    spills = re.findall(r"Function properties for (\w+)\n.* (\d+) bytes spill stores", said)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    assert len(spills) >= len(kernels) >= len(gencode)
    assert [(name, n) for name, n in spills if n != "0"] == []
    constants = [int(n) for n in re.findall(r"(\d+) bytes cmem\[0\]", said)]
    # Kernel arguments (at most 32,764 B) and the driver's own part (6.7 KB on sm_75).
    assert max(constants, default=0) <= 40 << 10
