"""Recorded outputs of the published implementations, through the installed package."""

from __future__ import annotations

import os
import subprocess
import sys


def test_every_recorded_vector_conforms(shared, device):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(shared / "golden" / "check.py"), "--device", device],
        capture_output=True, text=True, env={**os.environ, "ZSQ_REQUIRE_KERNELS": device},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "126/126" in done.stdout and "96/96" in done.stdout and "12/12" in done.stdout and "15/15" in done.stdout
