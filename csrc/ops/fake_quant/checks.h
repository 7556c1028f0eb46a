#pragma once
#include "../checks.h"

namespace zsq {
inline void check_weight(const char* op, const Tensor& weight, int64_t bits) {
  check_bits(op, bits);
  check_float(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() >= 1, op,
                    ": weight must have at least one dimension (the output channels), got a scalar");
}

inline void check_weights(const char* op, at::TensorList weights, int64_t bits) {
  check_bits(op, bits);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &w = weights[i], &first = weights[0];
    const auto name = [i] { return "weights[" + std::to_string(i) + "]"; };  // put together only when it is needed
    if (i == 0) check_float(op, "weights[0]", w);
    if (w.scalar_type() != first.scalar_type() || w.device() != first.device())
      check_like(op, name().c_str(), w, "weights[0]", first);
    TORCH_CHECK_VALUE(w.dim() >= 1, op, ": weights[", i,
                      "] must have at least one dimension (the output channels), got a scalar");
  }
}

inline void check_act(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_bits(op, bits);
  check_float(op, "x", x);
  check_scalar(op, "lo", lo, "x", x);
  check_scalar(op, "hi", hi, "x", x);
}

inline void check_track_range(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, const Tensor& beta_t,
                              double decay) {
  check_float(op, "x", x);
  check_scalar(op, "lo", lo, "x", x);
  check_scalar(op, "hi", hi, "x", x);
  check_scalar(op, "beta_t", beta_t, "x", x);
  const void *first = lo.const_data_ptr(), *second = hi.const_data_ptr(), *third = beta_t.const_data_ptr();
  TORCH_CHECK_VALUE(first != second && second != third && first != third, op,
                    ": lo, hi and beta_t must be different tensors, got one twice");
  TORCH_CHECK_VALUE(decay > 0 && decay < 1, op, ": decay must lie between 0 and 1, got ", decay);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must not be empty, an empty tensor has no range; got shape ", x.sizes());
}

inline void check_act_running(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, const Tensor& beta_t,
                              int64_t bits, double decay) {
  check_bits(op, bits);
  check_track_range(op, x, lo, hi, beta_t, decay);
}

inline void check_masked(const char* op, const Tensor& grad, const Tensor& mask) {
  check_float(op, "grad", grad);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, op, ": mask must be uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.device() == grad.device(), op, ": mask must be on the device of grad (", grad.device(),
                    "), got ", mask.device());
  const int64_t bytes = (grad.numel() + 7) / 8;
  TORCH_CHECK_VALUE(mask.is_contiguous() && mask.dim() == 1 && mask.size(0) == bytes, op,
                    ": mask must be contiguous with shape [", bytes, "] (1 bit per element of grad), got ",
                    mask.sizes());
}

// x itself, or a copy in the strides of the result where x has gaps or overlaps: kernels walk both in one order, which
// is also the order of the mask's bits.
inline Tensor as_result(const Tensor& x) { return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x); }

// One call's row views and results. Copies of odd layouts live here until the kernels are enqueued.
struct WeightViews {
  at::TensorList weights;
  std::vector<Tensor> copies, out;

  explicit WeightViews(at::TensorList weights) : weights(weights) { out.reserve(weights.size()); }
  // What the kernels take; tensors without elements are left out.
  template <class T, class F>
  std::vector<WeightTensor<T>> tensors(F empty_like) {
    std::vector<WeightTensor<T>> table;
    table.reserve(weights.size());
    for (const Tensor& given : weights) {
      const bool direct = has_dense_rows(given);
      if (!direct) copies.push_back(given.contiguous());
      const Tensor& w = direct ? given : copies.back();
      out.push_back(empty_like(w));
      const int64_t n = w.numel();
      if (n) table.push_back({read_ptr<T>(w), write_ptr<T>(out.back()), w.size(0), n / w.size(0)});
    }
    return table;
  }
  std::vector<Tensor> results() {
    if (!copies.empty())
      for (size_t i = 0; i < out.size(); ++i)
        if (!has_dense_rows(weights[i])) out[i] = at::empty_like(weights[i]).copy_(out[i]);
    return std::move(out);
  }
};
}  // namespace zsq
