"""The host executor notices bugs of every kind that a kernel can have: one per kernel of cuda_host/planted.cpp."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import toolkit

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or toolkit.include_dir() is None, reason="needs g++, CUDA headers"
)
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
SEEDS = range(1, 5)
# What notices it, in which build. Schedules decide whether a race shows in a result, so that a wrong result alone never counts but
# where memory is poisoned: shared memory that nobody cleared.
NOTICED = {
    "no-barrier-after-write": {"thread": "data race"},
    "no-barrier-before-reuse": {"thread": "data race"},
    "global-behind-the-end": {"address": "heap-buffer-overflow"},
    "shared-behind-the-end": {"address": "out of bounds"},
    "misaligned": {"address": "misaligned address"},
    "dynamic-shared-behind-the-end": {"address": "heap-buffer-overflow"},
    "global-before-the-start": {"address": "heap-buffer-overflow"},
    "shared-by-pointer": {"address": "buffer-overflow"},
    "full-mask-in-half-warp": {"address": "executor: .*__shfl_down_sync", "thread": "executor: .*__shfl_down_sync"},
    "caller-outside-mask": {"address": "executor: .*__shfl_xor_sync", "thread": "executor: .*__shfl_xor_sync"},
    "source-outside-mask": {"address": "executor: .*__shfl_xor_sync", "thread": "executor: .*__shfl_xor_sync"},
    "mixed-warp-operations": {"address": "executor: .*__shfl", "thread": "executor: .*__shfl"},
    "divergent-barrier": {"address": "divergent barrier", "thread": "divergent barrier"},
    "return-before-barrier": {"address": "divergent barrier", "thread": "divergent barrier"},
    "two-barrier-sites": {"address": "divergent barrier", "thread": "divergent barrier"},
    "warp-operation-against-barrier": {"address": "deadlock", "thread": "deadlock"},
    "shared-not-atomic": {"thread": "data race"},
    "global-not-atomic": {"thread": "data race"},
    "no-fence": {"thread": "data race"},
    "shared-not-cleared": {"address": "wrong result", "thread": "wrong result"},
    "no-grid-barrier": {"thread": "data race"},
    "block-skips-grid-barrier": {"address": "divergent (grid )?barrier", "thread": "divergent (grid )?barrier"},
}


@pytest.fixture(scope="module", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    keep = [] if request.param == "thread" else ["-fno-sanitize-recover=all"]
    out = tmp_path_factory.mktemp(request.param) / "planted"
    return request.param, toolkit.build_host(
        out, "planted.cpp", f"-fsanitize={SANITIZERS[request.param]}", *keep, with_kernels=False
    )


def said(program: Path, bug: str, seed: int) -> tuple[int, str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, bug, str(seed)], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_noticed_where_nothing_is_wrong(build: tuple[str, Path]) -> None:
    assert {said(build[1], "none", seed) for seed in range(8)} == {(0, "right result\n")}


@pytest.mark.parametrize(("build", "bug"), [(s, bug) for bug in NOTICED for s in NOTICED[bug]], indirect=["build"])
def test_a_planted_bug_is_noticed(build: tuple[str, Path], bug: str) -> None:
    """In every schedule, by what is meant to notice it."""
    sanitizer, program = build
    for seed in SEEDS:
        code, text = said(program, bug, seed)
        assert code != 0 and re.search(NOTICED[bug][sanitizer], text), (seed, code, text[:2000])


def test_every_planted_bug_is_tested(build: tuple[str, Path]) -> None:
    code, names = said(build[1], "?", 1)
    assert code == 2 and names.split() == ["none", *NOTICED]
