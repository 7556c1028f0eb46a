// One validator per operation, shared by the CPU and the CUDA entry, so that both fail with the same words.
// A message names the op, the argument, what is expected and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../quant_math.h"

namespace zsq {
using at::Tensor;

inline void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits must be 2 to 8, got ", bits);
}

inline void check_float(const char* op, const char* arg, const Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", arg,
                   " must be float32 or float64, got ", t.scalar_type());
}

// `t` must go with `x`: same dtype and device.
inline void check_like(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": ", arg, " must have the dtype of ", main, " (",
                   x.scalar_type(), "), got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", arg, " must be on the device of ", main, " (", x.device(),
                    "), got ", t.device());
}

inline void check_scalar(const char* op, const char* arg, const Tensor& t, const char* main, const Tensor& x) {
  check_like(op, arg, t, main, x);
  TORCH_CHECK_VALUE(t.numel() == 1, op, ": ", arg, " must have one element, got shape ", t.sizes());
}

inline void check_channels(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  check_like(op, arg, t, "x", x);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == x.size(1), op, ": ", arg, " must have shape [", x.size(1),
                    "] (one value per channel of x), got ", t.sizes());
}

inline void check_weight(const char* op, const Tensor& weight, int64_t bits) {
  check_bits(op, bits);
  check_float(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() >= 1, op,
                    ": weight must have at least one dimension (the output channels), got a scalar");
}

inline void check_act(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_bits(op, bits);
  check_float(op, "x", x);
  check_scalar(op, "lo", lo, "x", x);
  check_scalar(op, "hi", hi, "x", x);
}

inline void check_act_running(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, const Tensor& beta_t,
                              int64_t bits, double decay) {
  check_act(op, x, lo, hi, bits);
  check_scalar(op, "beta_t", beta_t, "x", x);
  TORCH_CHECK_VALUE(decay > 0 && decay < 1, op, ": decay must lie between 0 and 1, got ", decay);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must not be empty, an empty tensor has no range; got shape ", x.sizes());
}

inline void check_bn_stats(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape [N, C, ...], got ", x.sizes());
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must not be empty, an empty batch has no statistics; got shape ",
                    x.sizes());
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
}

// An element of a tensor list against its weight; the name is put together only when it is needed.
inline void check_item(const char* op, const char* list, size_t i, const Tensor& t, const Tensor& weight) {
  if (t.scalar_type() != weight.scalar_type() || t.device() != weight.device())
    check_like(op, (std::string(list) + "[" + std::to_string(i) + "]").c_str(), t, "its weight", weight);
}

inline void check_gi_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momenta, const Tensor& kappa,
                         const Tensor& changed, const GiOptions& o) {
  const char* op = "gi_sgd_";
  check_bits(op, o.bits);
  const auto n = weights.size();
  TORCH_CHECK_VALUE(n > 0, op, ": weights must not be empty");
  TORCH_CHECK_VALUE(grads.size() == n && momenta.size() == n, op, ": weights, grads and momenta must be as many, got ",
                    n, ", ", grads.size(), " and ", momenta.size());
  for (size_t i = 0; i < n; ++i) {
    const Tensor& w = weights[i];
    TORCH_CHECK_TYPE(w.scalar_type() == at::kFloat, op, ": weights[", i, "] must be float32, got ", w.scalar_type());
    TORCH_CHECK_VALUE(w.dim() >= 1, op, ": weights[", i, "] must have at least one dimension (the output channels)");
    check_item(op, "weights", i, w, weights[0]);
    check_item(op, "grads", i, grads[i], w);
    check_item(op, "momenta", i, momenta[i], w);
    TORCH_CHECK_VALUE(grads[i].sizes() == w.sizes(), op, ": grads[", i, "] must have shape ", w.sizes(), ", got ",
                      grads[i].sizes());
    TORCH_CHECK_VALUE(momenta[i].sizes() == w.sizes(), op, ": momenta[", i, "] must have shape ", w.sizes(), ", got ",
                      momenta[i].sizes());
  }
  check_like(op, "kappa", kappa, "weights[0]", weights[0]);
  TORCH_CHECK_TYPE(changed.scalar_type() == at::kLong, op, ": changed must be int64, got ", changed.scalar_type());
  TORCH_CHECK_VALUE(changed.device() == weights[0].device(), op, ": changed must be on ", weights[0].device(), ", got ",
                    changed.device());
  TORCH_CHECK_VALUE(kappa.is_contiguous() && kappa.dim() == 1 && kappa.size(0) == int64_t(n), op,
                    ": kappa must be contiguous with shape [", n, "], got ", kappa.sizes());
  TORCH_CHECK_VALUE(changed.is_contiguous() && changed.dim() == 1 && changed.size(0) == int64_t(n), op,
                    ": changed must be contiguous with shape [", n, "], got ", changed.sizes());
  TORCH_CHECK_VALUE(std::isfinite(o.lr) && o.lr >= 0, op, ": lr must be finite and not negative, got ", o.lr);
  TORCH_CHECK_VALUE(o.momentum >= 0 && o.momentum < 1, op, ": momentum must lie in [0, 1), got ", o.momentum);
  TORCH_CHECK_VALUE(std::isfinite(o.weight_decay) && o.weight_decay >= 0, op,
                    ": weight_decay must not be negative, got ", o.weight_decay);
  TORCH_CHECK_VALUE(o.threshold >= 0 && o.threshold <= 1, op, ": threshold is a share of codes in [0, 1], got ",
                    o.threshold);
  TORCH_CHECK_VALUE(o.search_steps >= 0 && o.search_steps <= kGiMaxSearchSteps, op, ": search_steps must be 0 to ",
                    kGiMaxSearchSteps, ", got ", o.search_steps);
}

// ---- layouts
// -----------------------------------------------------------------------------------------------------------

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
inline Tensor dense(const Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

struct ChannelView {
  Tensor x;  // dense, [N, C, S] in memory, or [N, S, C] when channels_last
  int64_t n, c, s;
  bool channels_last;
};
inline ChannelView channel_view(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), s = n && c ? x.numel() / (n * c) : 0;
  const auto format = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  const bool last = (x.dim() == 4 || x.dim() == 5) && !x.is_contiguous() && x.is_contiguous(format);
  return {last ? x : x.contiguous(), n, c, s, last || s == 1};
}

// The row view of a gradient or momentum buffer must follow the weight's own strides.
inline Tensor strided_like(const Tensor& t, const Tensor& weight) {
  return t.strides() == weight.strides() ? t
                                         : at::empty_strided(weight.sizes(), weight.strides(), t.options()).copy_(t);
}

// Row views of the tensors of a gi_sgd_ step. Copies of odd layouts live here; weights and momenta are written back.
struct GiViews {
  at::TensorList weights, momenta;
  std::vector<Tensor> w, g, v;

  GiViews(at::TensorList weights, at::TensorList grads, at::TensorList momenta) : weights(weights), momenta(momenta) {
    for (size_t i = 0; i < weights.size(); ++i) {
      w.push_back(with_dense_rows(weights[i]));
      g.push_back(strided_like(grads[i], w[i]));
      v.push_back(strided_like(momenta[i], w[i]));
    }
  }
  // GiTensor {weight, grad, momentum, rows, cols} of the CPU or of the CUDA kernel.
  template <class GiTensor>
  std::vector<GiTensor> tensors() const {
    using Extent = decltype(GiTensor::rows);
    std::vector<GiTensor> out;
    for (size_t i = 0; i < w.size(); ++i) {
      const int64_t rows = w[i].size(0), cols = rows ? w[i].numel() / rows : 0;
      TORCH_CHECK_VALUE(std::max(rows, cols) <= std::numeric_limits<Extent>::max(), "gi_sgd_: weights[", i,
                        "] has too many rows or columns: ", w[i].sizes());
      out.push_back({w[i].mutable_data_ptr<float>(), g[i].const_data_ptr<float>(), v[i].mutable_data_ptr<float>(),
                     Extent(rows), Extent(cols)});
    }
    return out;
  }
  void write_back() const {
    for (size_t i = 0; i < w.size(); ++i) {
      if (!w[i].is_same(weights[i])) weights[i].copy_(w[i]);
      if (!v[i].is_same(momenta[i])) momenta[i].copy_(v[i]);
    }
  }
};
}  // namespace zsq
