// One validator per operation, shared by the CPU and the CUDA entry, so that both fail with the same words.
// A message names the op, the argument, what is expected and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../args.h"
#include "../quant_math.h"

namespace zsq {
using at::Tensor;

inline void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits must be 2 to 8, got ", bits);
}

inline void check_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, op, ": eps must be finite and not negative, got ", eps);
}

inline bool is_wide(const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble; }
inline void check_wide(const char* op, const char* arg, const Tensor& t) {
  TORCH_CHECK_TYPE(is_wide(t), op, ": ", arg, " must be float32 or float64, got ", t.scalar_type());
}
inline void check_float(const char* op, const char* arg, const Tensor& t) {
  TORCH_CHECK_TYPE(is_wide(t) || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, op, ": ", arg,
                   " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
}
// What parameters, states and results of reductions of `t` are held in (Wide<T> in the kernels).
inline at::ScalarType wide_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// `t` must go with `x`: same dtype and device.
inline void check_like(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": ", arg, " must have the dtype of ", main, " (",
                   x.scalar_type(), "), got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", arg, " must be on the device of ", main, " (", x.device(),
                    "), got ", t.device());
}

inline void check_shape(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), op, ": ", arg, " must have the shape of ", main, " (", x.sizes(), "), got ",
                    t.sizes());
}

// `t` must go with `x` element by element.
inline void check_same(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  check_like(op, arg, t, main, x);
  check_shape(op, arg, t, main, x);
}

// `t` holds parameters or states of `x`: on its device, in its arithmetic type.
inline void check_param(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  TORCH_CHECK_TYPE(t.scalar_type() == wide_type(x), op, ": ", arg, " must be ", wide_type(x), " for ", main, " of ",
                   x.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", arg, " must be on the device of ", main, " (", x.device(),
                    "), got ", t.device());
}

inline void check_scalar(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  check_param(op, arg, t, main, x);
  TORCH_CHECK_VALUE(t.numel() == 1, op, ": ", arg, " must have one element, got shape ", t.sizes());
}

inline void check_channels(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  check_param(op, arg, t, "x", x);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == x.size(1), op, ": ", arg, " must have shape [", x.size(1),
                    "] (one value per channel of x), got ", t.sizes());
}

inline void check_feature_map(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape [N, C, ...], got ", x.sizes());
}

// Pointers by storage type; at's own accessors do not know Bf16 and Half. An undefined tensor gives null.
template <class T>
const T* read_ptr(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T>
T* write_ptr(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// ---- layouts
// Rows (output channels) that lie one after the other, in any inner order: contiguous and channels_last weights both
// do.
inline bool has_dense_rows(const Tensor& w) {
  return w.is_non_overlapping_and_dense() && (w.size(0) <= 1 || w.stride(0) == w.numel() / w.size(0));
}
inline Tensor with_dense_rows(const Tensor& w) { return has_dense_rows(w) ? w : w.contiguous(); }

// A result in the strides that torch gives an element-wise result of `x`, which is also what tracing was told.
inline Tensor strided_as_result_of(const Tensor& x, const Tensor& dense_x, const Tensor& result) {
  return dense_x.is_same(x) ? result : at::empty_like(x).copy_(result);
}
inline Tensor contiguous_or_undefined(const std::optional<Tensor>& t) { return t ? t->contiguous() : Tensor(); }
inline Tensor dense(const Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

struct ChannelView {
  Tensor x;  // dense, [N, C, S] in memory, or [N, S, C] when channels_last
  int64_t n, c, s;
  bool channels_last;
  Plane shape() const { return {n, c, s, channels_last}; }
};
inline ChannelView channel_view(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), s = n && c ? x.numel() / (n * c) : 0;
  const auto format = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  const bool last = (x.dim() == 4 || x.dim() == 5) && !x.is_contiguous() && x.is_contiguous(format);
  return {last ? x : x.contiguous(), n, c, s, last || s == 1};
}

// `t` in the strides of `like`: gradients, momentum buffers and residuals must be walked in the order of their tensor.
inline Tensor strided_like(const Tensor& t, const Tensor& like) {
  return t.strides() == like.strides() ? t : at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
}

}  // namespace zsq
