#pragma once
#include "../checks.h"

namespace zsq {
inline void check_bn_stats(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var) {
  check_wide(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape [N, C, ...], got ", x.sizes());
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must not be empty, an empty batch has no statistics; got shape ",
                    x.sizes());
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
}
}  // namespace zsq
