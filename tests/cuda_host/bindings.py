"""ctypes over shim.cpp: the kernel launchers, run by the host executor, as Python calls on CPU tensors."""

from __future__ import annotations

import ctypes as c
from pathlib import Path

import torch


def as_c(value: object) -> object:
    """Tensors travel as pointers, Python ints as int64; anything else that C wants as an int comes as c_int."""
    if isinstance(value, torch.Tensor):
        return c.c_void_p(value.data_ptr())
    return {int: c.c_int64, float: c.c_double, bool: c.c_bool}.get(type(value), lambda v: v)(value)


class GiTensor(c.Structure):
    _fields_ = [(n, c.c_void_p) for n in ("weight", "grad", "momentum")] + [("rows", c.c_int32), ("cols", c.c_int32)]


class GiOptions(c.Structure):
    _fields_ = [(n, c.c_double) for n in ("lr", "momentum", "weight_decay", "threshold")]
    _fields_ += [
        ("bits", c.c_int),
        ("search_steps", c.c_int),
        *((n, c.c_bool) for n in ("nesterov", "capped", "guaranteed")),
    ]


SUFFIXES = {torch.float32: "_f32", torch.float64: "_f64", torch.bfloat16: "_bf16", torch.float16: "_f16"}


class Kernels:
    def __init__(self, path: Path):
        self.lib = c.CDLL(str(path))
        self.lib.zsq_error.restype = c.c_char_p
        self.lib.zsq_launches.restype = c.c_ulonglong

    def __call__(self, name: str, *args: object) -> None:
        """Run the launcher for the element type of the first tensor."""
        kind = next((a.dtype for a in args if isinstance(a, torch.Tensor)), None)
        function = getattr(self.lib, f"zsq_{name}{SUFFIXES.get(kind, '')}")
        assert function(*map(as_c, args)) == 0, self.lib.zsq_error().decode()

    def workspace(self, name: str, *args: object) -> torch.Tensor:
        function = getattr(self.lib, f"zsq_{name}_workspace")
        function.restype = c.c_size_t
        return torch.full(
            (function(*map(as_c, args)),), 0xA5, dtype=torch.uint8
        )  # launchers must not count on its contents

    def gi_sgd(self, weights, grads, momenta, **options):
        table = (GiTensor * len(weights))()
        for i, (w, g, v) in enumerate(zip(weights, grads, momenta, strict=True)):
            assert w.stride() == g.stride() == v.stride()
            table[i] = GiTensor(w.data_ptr(), g.data_ptr(), v.data_ptr(), w.shape[0], w.numel() // max(w.shape[0], 1))
        kappa, changed = torch.full((len(weights),), -1.0), torch.full((len(weights),), -1)
        count, scratch = c.c_int(len(weights)), self.workspace("gi", c.c_int(len(weights)))
        outputs = as_c(kappa), as_c(changed)
        self("gi_sgd", table, count, *outputs, c.byref(GiOptions(**options)), as_c(scratch))
        return kappa, changed


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, any NaN counting as any other."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size(), a.dtype)
    return a.shape == b.shape and bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A copy that is not 16-byte aligned."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t)
