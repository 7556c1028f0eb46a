// Launchers of the CUDA kernels on raw device pointers. No Torch: csrc/ops/cuda.cpp checks, allocates and calls these.
//
// Every function enqueues on `stream`, never synchronises with the host, may be captured in a CUDA graph and returns
// the first launch error. T is float, double, Bf16 or Half. Sizes are element counts; a size of zero launches nothing.
// Workspaces need no initial contents.
#pragma once
#include <driver_types.h>

#include <cstddef>
#include <cstdint>

#include "../args.h"
#include "../quant_math.h"

namespace zsq::cuda {

// out = decode(encode(w)) with the range of each row. w, out: [rows, cols].
template <class T>
cudaError_t fake_quant_weight(const T* w, T* out, int64_t rows, int64_t cols, int bits, cudaStream_t stream);

// The same for `count` tensors (host array) in one launch per 1,000 of them.
template <class T>
cudaError_t fake_quant_weights(const WeightTensor<T>* tensors, int count, int bits, cudaStream_t stream);

// codes = encode(w) + zero_point: [rows, cols]; scale, lo_code = zero_point - 2^(bits-1): [rows].
template <class T>
cudaError_t weight_codes(const T* w, Wide<T>* codes, Wide<T>* scale, Wide<T>* lo_code, int64_t rows, int64_t cols,
                         int bits, cudaStream_t stream);

// out = decode(encode(x)) on the range [*lo, *hi] held on the device. x, out: [n].
template <class T>
cudaError_t fake_quant_act(const T* x, const Wide<T>* lo, const Wide<T>* hi, T* out, int64_t n, int bits,
                           cudaStream_t stream);

// And mask [ceil(n/8)]: bit i%8 of byte i/8 says that x[i] was not clamped; unused bits of the last byte are 0.
template <class T>
cudaError_t fake_quant_act_clip(const T* x, const Wide<T>* lo, const Wide<T>* hi, T* out, uint8_t* mask, int64_t n,
                                int bits, cudaStream_t stream);

// out = grad where the mask's bit is set, else 0.
template <class T>
cudaError_t masked(const T* grad, const uint8_t* mask, T* out, int64_t n, cudaStream_t stream);

// Updates *lo, *hi and *beta_t from the range of x (`track` in quant_math.h).
size_t track_range_workspace(size_t element_size);
template <class T>
cudaError_t track_range(const T* x, Wide<T>* lo, Wide<T>* hi, Wide<T>* beta_t, int64_t n, double decay, bool plain,
                        void* workspace, cudaStream_t stream);

// And quantizes x with the new range. The workspace is that of track_range.
template <class T>
cudaError_t fake_quant_act_running(const T* x, Wide<T>* lo, Wide<T>* hi, Wide<T>* beta_t, T* out, int64_t n, int bits,
                                   double decay, bool plain, void* workspace, cudaStream_t stream);

// Learned step sizes. x, out, grad, grad_x: [rows, cols]; step, grad_step: [rows]. Codes lie in code_min .. code_max.
template <class T>
cudaError_t fake_quant_learned(const T* x, const Wide<T>* step, T* out, int64_t rows, int64_t cols, int code_min,
                               int code_max, cudaStream_t stream);
size_t fake_quant_learned_backward_workspace(int64_t rows, int64_t cols, size_t element_size);
template <class T>
cudaError_t fake_quant_learned_backward(const T* grad, const T* x, const Wide<T>* step, T* grad_x, Wide<T>* grad_step,
                                        int64_t rows, int64_t cols, int code_min, int code_max, double grad_factor,
                                        void* workspace, cudaStream_t stream);

// Sums over N and S in an order that depends only on the shape (and on whether x is 16-byte aligned). N, C, S > 0.
size_t bn_stats_workspace(const Plane& shape, size_t element_size);
template <class T>
cudaError_t bn_stats(const BnStatsArgs<T>& args, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t bn_stats_backward(const BnStatsBackwardArgs<T>& args, cudaStream_t stream);
size_t bn_eval_sums_workspace(const Plane& shape, size_t element_size);
template <class T>
cudaError_t bn_eval_sums(const BnEvalSumsArgs<T>& args, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t bn_eval_sums_backward(const BnEvalSumsBackwardArgs<T>& args, cudaStream_t stream);
// loss [1] and grad_sums [2, C] from sums [2, C] over `count` values per channel.
template <class T>
cudaError_t bn_stats_loss(const double* sums, const T* var, int64_t channels, int64_t count, T* loss,
                          cudaStream_t stream);
template <class T>
cudaError_t bn_stats_loss_backward(const T* grad_loss, const double* sums, const T* var, int64_t channels,
                                   int64_t count, double* grad_sums, cudaStream_t stream);

template <class T>
cudaError_t bn_act(const BnActArgs<T>& args, cudaStream_t stream);
size_t bn_act_backward_workspace(const Plane& shape, size_t element_size);
template <class T>
cudaError_t bn_act_backward(const BnActBackwardArgs<T>& args, void* workspace, cudaStream_t stream);

// student, teacher, grad, grad_teacher: [batch, classes]; teacher, target and grad_teacher may be null; loss, kd, ce:
// [1]. A target out of range makes the loss NaN.
size_t distillation_loss_workspace(int64_t batch);
template <class T>
cudaError_t distillation_loss(const T* student, const T* teacher, const int64_t* target,
                              const DistillationOptions& options, Wide<T>* loss, Wide<T>* kd, Wide<T>* ce, T* grad,
                              T* grad_teacher, int64_t batch, int64_t classes, void* workspace, cudaStream_t stream);
// student_map, teacher_map: mean squares [N,C] (channel), [N,S] (spatial), unused (direct).
size_t feature_alignment_workspace(const Plane& shape, Alignment kind, size_t element_size);
template <class T>
cudaError_t feature_alignment(const T* student, const T* teacher, Alignment kind, Wide<T>* loss, Wide<T>* student_map,
                              Wide<T>* teacher_map, const Plane& shape, void* workspace, cudaStream_t stream);
// grad_student or grad_teacher may be null.
size_t feature_alignment_backward_workspace(const Plane& shape, Alignment kind, size_t element_size);
template <class T>
cudaError_t feature_alignment_backward(const Wide<T>* grad_loss, const T* student, const T* teacher,
                                       const Wide<T>* student_map, const Wide<T>* teacher_map, Alignment kind,
                                       T* grad_student, T* grad_teacher, const Plane& shape, void* workspace,
                                       cudaStream_t stream);
// out = x + epsilon*sign(grad)
template <class T>
cudaError_t sign_perturb(const T* x, const T* grad, double epsilon, T* out, int64_t n, cudaStream_t stream);

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
