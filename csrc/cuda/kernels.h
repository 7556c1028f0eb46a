// Launchers of the CUDA kernels on raw device pointers. No Torch: csrc/ops/cuda.cpp checks, allocates and calls these.
//
// Every function enqueues on `stream`, never synchronises with the host, may be captured in a CUDA graph and returns
// the first launch error. T is float or double. Sizes are element counts; a size of zero launches nothing. Workspaces
// need no initial contents.
#pragma once
#include <driver_types.h>

#include <cstddef>
#include <cstdint>

#include "../quant_math.h"

namespace zsq::cuda {

// out = decode(encode(w)) with the range of each row. w, out: [rows, cols].
template <class T>
cudaError_t fake_quant_weight(const T* w, T* out, int64_t rows, int64_t cols, int bits, cudaStream_t stream);

// codes = encode(w) + zero_point: [rows, cols]; scale, lo_code = zero_point - 2^(bits-1): [rows].
template <class T>
cudaError_t weight_codes(const T* w, T* codes, T* scale, T* lo_code, int64_t rows, int64_t cols, int bits,
                         cudaStream_t stream);

// out = decode(encode(x)) on the range [*lo, *hi] held on the device. x, out: [n].
template <class T>
cudaError_t fake_quant_act(const T* x, const T* lo, const T* hi, T* out, int64_t n, int bits, cudaStream_t stream);

// Updates *lo, *hi and *beta_t from the range of x (`track` in quant_math.h), then quantizes x with the new range.
size_t fake_quant_act_running_workspace(size_t element_size);
template <class T>
cudaError_t fake_quant_act_running(const T* x, T* lo, T* hi, T* beta_t, T* out, int64_t n, int bits, double decay,
                                   bool plain, void* workspace, cudaStream_t stream);

// x: [N, C, S], or [N, S, C] when channels_last; mean, var, batch_mean, batch_var (biased): [C]; loss: [1].
// The order of summation depends only on the shape (and on whether x is 16-byte aligned). N, C, S > 0.
size_t bn_stats_workspace(int64_t N, int64_t C, int64_t S, bool channels_last, size_t element_size);
template <class T>
cudaError_t bn_stats(const T* x, const T* mean, const T* var, T* loss, T* batch_mean, T* batch_var, int64_t N,
                     int64_t C, int64_t S, bool channels_last, void* workspace, cudaStream_t stream);

// grad_x = grad_loss/(C*N*S) * (2(batch_mean-mean) + 4(batch_var-var)(x-batch_mean)), laid out as x.
template <class T>
cudaError_t bn_stats_backward(const T* grad_loss, const T* x, const T* mean, const T* var, const T* batch_mean,
                              const T* batch_var, T* grad_x, int64_t N, int64_t C, int64_t S, bool channels_last,
                              cudaStream_t stream);

// One weight tensor of gradient inundation: [rows, cols] each, same element order in all three.
struct GiTensor {
  float* weight;
  const float* grad;
  float* momentum;
  int32_t rows, cols;
};

// One SGD step on all tensors with the step of each amplified by its own kappa. tensors: host array [count];
// kappa, changed: device [count].
size_t gi_sgd_workspace(int count);
cudaError_t gi_sgd(const GiTensor* tensors, int count, float* kappa, int64_t* changed, const GiOptions& options,
                   void* workspace, cudaStream_t stream);

}  // namespace zsq::cuda
