"""PEP 517 backend: setuptools, plus the build tools that the native module needs in this environment.

torch is never requested: a frontend would then download some torch into the build environment and the kernels would be
compiled against that one instead of the user's.
"""

from __future__ import annotations

import os
import sys

import zsq_probe
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def nvcc_wheels(torch: zsq_probe.Torch) -> list[str]:
    """NVIDIA's compiler as wheels (they exist from CUDA 13 on), for a CUDA torch on a machine without a fitting nvcc.

    100 MB that only a machine with a GPU has a use for: asked for there, by ZSQ_NVCC=pip, or when CUDA kernels are
    required. A requirement that the index cannot serve would stop pip, so pip is asked first.
    """
    choice = os.environ.get("ZSQ_NVCC", "")
    wanted = choice == "pip" or zsq_probe.visible_gpu_arches() or "cuda" in zsq_probe.required_kernels()
    if torch.cuda_major < 13 or os.environ.get("ZSQ_CUDA") == "0" or choice not in ("", "pip") or not wanted:
        return []
    if zsq_probe.find_nvcc(torch)[0]:
        return []
    release = ".".join(torch.cuda.split(".")[:2])
    wheels = [f"nvidia-{part}=={release}.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
    options = "--quiet --dry-run --ignore-installed --no-deps --only-binary=:all:".split()
    code, _, err = zsq_probe.ask([sys.executable, "-m", "pip", "install", *options, *wheels], timeout=300)
    if code:
        print(f"zsq_fast: NVIDIA's compiler is not to be had through pip: {err.strip()[-300:]}", file=sys.stderr)
    return [] if code else wheels


def _tools() -> list[str]:
    """Requirements of the native build; none where it cannot run, so that those machines need no download."""
    torch, _ = zsq_probe.find_torch()
    if not torch or not zsq_probe.find_compiler()[0]:
        return []
    tools = [] if zsq_probe.usable_cmake() else ["cmake>=3.22"]
    tools += [] if zsq_probe.find_tool("ninja") else ["ninja"]
    return tools + nvcc_wheels(torch)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _tools()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _tools()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
