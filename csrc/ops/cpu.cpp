// CPU entries: check, allocate, call the kernel, return.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../cpu/kernels.h"
#include "checks.h"
#include "memory.h"

namespace zsq {
namespace {
int threads() { return at::get_num_threads(); }

// Calls f with a value of the tensor's storage type.
template <class F>
auto by_type(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(Bf16{});
    case at::kHalf:
      return f(Half{});
    default:
      return f(float{});
  }
}
// The same for operations in float32 and float64 only.
template <class F>
auto by_wide_type(const Tensor& t, F f) {
  return t.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

template <class T>
const cpu::TypedKernels<T>& kernels_of(T) {
  return cpu::typed<T>(cpu::kernels());
}
}  // namespace
}  // namespace zsq

#include "bn_act/cpu.inc"
#include "bn_stats/cpu.inc"
#include "fake_quant/cpu.inc"
#include "gi_sgd/cpu.inc"
#include "learned_step/cpu.inc"
#include "losses/cpu.inc"
