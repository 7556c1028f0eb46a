"""Memory of large CPU results: kept after they are freed, never shared by two live ones, given back on request."""

from __future__ import annotations

import threading

import torch

from zsq_fast import ops

LARGE = 300_000  # values; a megabyte and more is kept
LO, HI = torch.tensor(-1.0), torch.tensor(1.0)


def quantize(x: torch.Tensor) -> torch.Tensor:
    return ops.fake_quant_act(x, LO, HI, 4)


def test_freed_memory_serves_the_next_result():
    ops.release_memory()
    x = torch.randn(LARGE)
    first = quantize(x)
    alive = quantize(x)
    assert alive.data_ptr() != first.data_ptr()
    at, values = first.data_ptr(), first.clone()
    view = first[5:]
    del first
    assert quantize(x).data_ptr() != at, "a view keeps its memory"
    del view
    again = [quantize(x) for _ in range(3)]
    assert at in [t.data_ptr() for t in again] and all(torch.equal(t, values) for t in again)
    del again
    del alive
    assert ops.release_memory() >= 4 * LARGE and ops.release_memory() == 0


def test_a_result_can_grow_and_travel():
    x = torch.randn(LARGE)
    out = quantize(x)
    out.resize_(2 * LARGE)[LARGE:].zero_()
    assert torch.equal(out[:LARGE], quantize(x)) and not out[LARGE:].any()
    assert torch.equal(torch.from_numpy(quantize(x).numpy()), quantize(x)) and quantize(x).share_memory_().is_shared()


def test_what_is_kept_is_bounded():
    ops.release_memory()
    many = [quantize(torch.zeros(1 << 26)) for _ in range(5)]  # 5 of 256 MiB
    del many
    assert 0 < ops.release_memory() <= 1 << 30


def test_many_threads():
    wrong = []

    def work(seed: int) -> None:
        x = torch.full((LARGE,), seed / 4)
        want = quantize(x[:1]).item()
        for _ in range(30):
            if not (quantize(x) == want).all():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
