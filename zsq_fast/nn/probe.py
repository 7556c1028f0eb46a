"""One forward on zeros, to see how a network is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.errors import UsageError


@contextmanager
def probing(model: nn.Module, input_size: Sequence[int], handles: Sequence[Any]) -> Iterator[Tensor]:
    """Two zero images `[2, C, H, W]` to run the model on, in eval mode; afterwards its modes are restored and the hooks removed.

    Raises UsageError when the model does not run on that size.
    """
    modes = {m: m.training for m in model.modules()}
    weight = next(model.parameters())
    model.eval()
    try:
        yield torch.zeros(2, *input_size, device=weight.device, dtype=weight.dtype)
    except Exception as error:
        raise UsageError(f"the model does not run on an input of size {tuple(input_size)}: {error}") from error
    finally:
        for m, training in modes.items():
            m.training = training
        for handle in handles:
            handle.remove()
