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

// Results of one call in one allocation: making many small ones costs more than filling them. They share its storage
// (unlike the CPU's ResultBlock), so that `record_stream` on one of them reaches the caching allocator.
class ResultArena {
 public:
  explicit ResultArena(at::TensorList like) {  // room for a result like each of these
    int64_t bytes = 0;
    for (const Tensor& t : like) bytes += padded(t);
    memory_ = at::empty({bytes}, like[0].options().dtype(at::kByte));
  }
  Tensor empty_like(const Tensor& dense) {
    Tensor result = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(memory_.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA), dense.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(dense.sizes(), dense.strides(), next_ / dense.element_size());
    next_ += padded(dense);
    return result;
  }

 private:
  static int64_t padded(const Tensor& t) {  // aligned as a fresh allocation is
    return int64_t(t.nbytes() + 255) / 256 * 256;
  }
  Tensor memory_;
  int64_t next_ = 0;
};
}  // namespace
}  // namespace zsq

#include "bn_act/cuda.inc"
#include "bn_stats/cuda.inc"
#include "fake_quant/cuda.inc"
#include "gi_sgd/cuda.inc"
#include "learned_step/cuda.inc"
#include "losses/cuda.inc"
