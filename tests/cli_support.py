"""A tiny trained network on disk and the command line in this or another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from zsq_fast import errors
from zsq_fast.cli import main

# Other processes import the package that is tested here, be it installed or the source tree.
# One thread: two on a busy machine wait for each other more than they compute.
# PYTHONSAFEPATH (3.11): `python -m` must not put the working directory, which may be this repository, before it.
ENVIRONMENT = {
    **os.environ,
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(errors.__file__).parents[1]),
}
SIZE = "3,8,8"


def schedule(**numbers: object) -> list[str]:
    """The options that set numbers of the recipe's schedule."""
    return [word for name, value in numbers.items() for word in ("--set", f"schedule.{name}={value}")]


# Ends within a second where a command that must be refused is not.
SHORT = [*schedule(epochs=2, warmup_epochs=1, calibration_epochs=1, iterations=2, batch_size=4), "--threads", "1"]

FACTORY = """
import torch
from torch import nn

def tiny(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

def with_silu():
    model = tiny()
    model[2] = nn.SiLU()
    return trained(model)

def trained(model):
    torch.manual_seed(0)
    model.train()
    for _ in range(8):
        model(torch.randn(16, 3, 8, 8))
    return model

def nothing():
    return trained(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Softmax(1)))

def no_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def untracked():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def nan_weight():
    model = trained(tiny())
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    return model

def crash():
    raise RuntimeError("a bug in the user's factory\\nwith two lines")

def leave():
    raise SystemExit("goodbye")

def leave_well():
    raise SystemExit(0)

def hungry():
    model = trained(tiny())
    model.register_forward_pre_hook(lambda module, args: None if len(args[0]) < 4 else torch.empty(1 << 60))
    return model

not_a_model = dict
"""


@dataclass(frozen=True)
class Tiny:
    """Paths of one test: the factory's source, the checkpoint, test images, and where runs go."""

    root: Path
    source: Path
    checkpoint: Path
    images: Path

    @property
    def model(self) -> list[str]:
        return [f"{self.source}:tiny", "--allow-import", "--checkpoint", str(self.checkpoint)]

    def spec(self, factory: str) -> list[str]:
        return [f"{self.source}:{factory}", "--allow-import", "--input-size", SIZE]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_tiny(root: Path) -> Tiny:
    source = root / "networks.py"
    source.write_text(FACTORY)
    space: dict[str, Callable[..., nn.Module]] = {}
    exec(FACTORY, space)
    with one_thread():
        model = space["trained"](space["tiny"]())
    checkpoint = root / "tiny.safetensors"
    header = {"input_size": SIZE, "norm": "mean 0.5,0.5,0.5 std 0.25,0.25,0.25"}
    save_file(model.state_dict(), checkpoint, header)
    random = np.random.default_rng(0)
    images = root / "images.npz"
    np.savez(images, images=random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), labels=random.integers(0, 4, 40))
    return Tiny(root, source, checkpoint, images)


def state_of(tiny: Tiny) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(tiny.checkpoint)


def start(*words: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zsq_fast.cli", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **{**pipes, **options})


def call(capsys, *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line in this process."""
    capsys.readouterr()
    with one_thread():
        code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_sentence(err: str) -> str:
    """The error line; it is the only one, and there is no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("zsq-fast: error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0] and "Traceback" not in err, err
    return lines[0]
