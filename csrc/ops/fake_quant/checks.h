#pragma once
#include "../checks.h"

namespace zsq {
inline void check_weight(const char* op, const Tensor& weight, int64_t bits) {
  check_bits(op, bits);
  check_wide(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() >= 1, op,
                    ": weight must have at least one dimension (the output channels), got a scalar");
}

inline void check_act(const char* op, const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_bits(op, bits);
  check_wide(op, "x", x);
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
}  // namespace zsq
