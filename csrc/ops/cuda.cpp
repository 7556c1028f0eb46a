// CUDA entries: check, device guard, current stream, allocate, launch, check the launch, return. Never waits for the
// device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../cuda/kernels.h"
#include "checks.h"

namespace zsq {
namespace {
// Makes the tensor's device current while it lives; `stream` is that device's current stream.
struct On {
  explicit On(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

// Calls launch with a value of the tensor's storage type and throws if it fails.
template <class F>
void launch_typed(const Tensor& t, F launch) {
  switch (t.scalar_type()) {
    case at::kDouble:
      C10_CUDA_CHECK(launch(double{}));
      break;
    case at::kBFloat16:
      C10_CUDA_CHECK(launch(Bf16{}));
      break;
    case at::kHalf:
      C10_CUDA_CHECK(launch(Half{}));
      break;
    default:
      C10_CUDA_CHECK(launch(float{}));
  }
}
// The same for operations in float32 and float64 only.
template <class F>
void launch_wide(const Tensor& t, F launch) {
  C10_CUDA_CHECK(t.scalar_type() == at::kDouble ? launch(double{}) : launch(float{}));
}

// Freed on return although kernels still use it: the caching allocator hands it out again only behind them on the same
// stream.
Tensor workspace(const Tensor& like, size_t bytes) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}
}  // namespace
}  // namespace zsq

#include "bn_act/cuda.inc"
#include "bn_stats/cuda.inc"
#include "fake_quant/cuda.inc"
#include "gi_sgd/cuda.inc"
#include "learned_step/cuda.inc"
#include "losses/cuda.inc"
