"""Devices, seeds and the shared material."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch
from cuda_host import toolkit
from cuda_host.bindings import Kernels

# Processes of `pytest -n` share the cores: threads of OpenMP that wait for each other's core cost more than they bring.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    torch.set_num_threads(share)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded vectors and real data; it lies beside the repository, or ZSQ_SHARED names it."""
    folder = Path(os.environ.get("ZSQ_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder.name!r} beside the repository (set ZSQ_SHARED)")
    return folder


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The CUDA kernels, compiled for the CPU and run by the host executor."""
    if shutil.which("g++") is None or toolkit.include_dir() is None:
        pytest.skip("needs g++ and the CUDA headers")
    return Kernels(toolkit.build_host(tmp_path_factory.mktemp("host") / "libkernels.so", "shim.cpp", "-shared"))


@pytest.fixture(params=[0, 1, 2])
def seeded(request: pytest.FixtureRequest, kernels: Kernels) -> Kernels:
    """The same under another order of threads and blocks."""
    kernels.lib.zsq_seed(ctypes.c_uint64(request.param))
    torch.manual_seed(request.param)
    return kernels


@pytest.fixture
def pair(device):
    """A frozen teacher, its calibrated 3-bit student, and a batch, for 8 x 8 inputs."""
    from networks import residual

    import zsq_fast as zsq
    from zsq_fast.methods.synthesis import Batch

    teacher = residual().to(device).requires_grad_(False)
    student = zsq.convert(teacher, 3, 3, ema="plain", input_size=(3, 8, 8)).eval().requires_grad_(True)
    x = torch.randn(8, 3, 8, 8, device=device)
    with zsq.nn.calibrating(student), torch.no_grad():
        student(x)
    zsq.nn.freeze_ranges(student)
    return teacher, student, Batch(x, torch.arange(8, device=device) % 4)
