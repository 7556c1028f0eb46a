"""The sanitizer cases of the CUDA kernels notice every barrier, fence or atomic that goes missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cuda_host import mutants, toolkit

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None or toolkit.include_dir() is None, reason="needs g++, CUDA headers"),
    pytest.mark.timeout(1800),  # two processes of minutes; a CI machine may be slow
]

# Mutants that no schedule can tell from the kernel: (file, the line as it stands) -> why.
EQUIVALENT = {
    ("bn_act.cu", "__syncthreads();  // an earlier call may still be reading"): (
        "column_sums is called twice, with the barriers of arrive_last in between"
    ),
}


def test_every_mutant_is_noticed(tmp_path: Path) -> None:
    found = mutants.plant(mutants.copy_sources(tmp_path))
    for file, source in EQUIVALENT:
        count = sum((m.file, m.source) == (file, source) for m in found)
        assert count == 1, f"EQUIVALENT names one line, {file} has {count} of it: {source}"
    left = mutants.Program(tmp_path, found).survivors()
    noticed = [e for e in EQUIVALENT if e not in {(m.file, m.source) for m in left}]
    assert not noticed, f"no longer equivalent, take it out of EQUIVALENT: {noticed}"
    weak = [f"{m}  ({why})" for m, why in left.items() if (m.file, m.source) not in EQUIVALENT]
    assert not weak, "no case of tests/cuda_host/main_*.inc notices the loss of\n" + "\n".join(weak)


TINY = """
#include "launch.h"
namespace zsq::cuda {
// __syncthreads() in a comment, as atomicAdd(p, 1), is no site
__global__ void tiny_kernel(const int* x, int* out, unsigned* total) {
  ZSQ_SHARED(int, tile, [64]);
  const int t = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * 64 + t;
  const auto block = cooperative_groups::this_thread_block();
  tile[t] = x[at];
  __syncwarp();  // needed
  int s = tile[t ^ 1];
  block.sync();  // needed
  s += tile[63 - t];
  __syncthreads();  // spare: nobody writes to the tile any more
  if (t > 64) __syncthreads();  // spare: never reached
  atomicAdd(total, static_cast<unsigned>(s));  // needed
  atomicMax(out + at, s);  // spare: the element is its own
  if (__syncthreads_or(s == 64)) out[at] += 1000;  // needed for the value
}
void tiny(const int* x, int* out, unsigned* total) { launch({2, 64}, tiny_kernel, x, out, total); }
}
"""
TINY_MAIN = """
#include <cstdio>
#include "host_exec.h"
namespace zsq::cuda { void tiny(const int* x, int* out, unsigned* total); }
int main() {
  int x[128], out[128] = {};
  unsigned total = 0, sum = 0;
  for (int i = 0; i < 128; ++i) x[i] = i;
  zsq::cuda::tiny(x, out, &total);
  for (int i = 0; i < 128; ++i) sum = sum * 31 + static_cast<unsigned>(out[i]);
  std::printf("total %u, digest %u\\n", total, sum);
}
"""


def test_a_needed_barrier_is_told_from_a_spare_one(tmp_path: Path) -> None:
    cuda = mutants.copy_sources(tmp_path)
    for path in [*cuda.glob("*.cu"), *cuda.glob("*.h")]:
        if path.name != "launch.h":
            path.unlink()
    host = tmp_path / "tests" / "cuda_host"
    (cuda / "tiny.cu").write_text(TINY)
    (host / "main.cpp").write_text(TINY_MAIN)
    (host / "main_tiny.inc").touch()
    found = mutants.plant(cuda)
    assert [m.line for m in found] == [
        i for i, s in enumerate(TINY.split("\n"), 1) if "// needed" in s or "// spare" in s
    ]
    left = mutants.Program(tmp_path, found).survivors()
    assert set(left) == {m for m in found if "// spare" in m.source}
    for mutant, said in left.items():
        assert ("was reached 0 times" in said) == ("never reached" in mutant.source)
