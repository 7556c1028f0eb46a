#pragma once
#include "../checks.h"

namespace zsq {
inline void check_bn_stats(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var) {
  check_feature_map(op, x);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must not be empty, an empty batch has no statistics; got shape ",
                    x.sizes());
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
}

inline void check_bn_eval(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
                          const std::optional<Tensor>& weight, double eps) {
  check_feature_map(op, x);
  check_eps(op, eps);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  if (weight) check_channels(op, "weight", *weight, x);
}

inline void check_sums(const char* op, const char* arg, const Tensor& sums, const Tensor& like, int64_t channels) {
  TORCH_CHECK_TYPE(sums.scalar_type() == at::kDouble, op, ": ", arg, " must be float64, got ", sums.scalar_type());
  TORCH_CHECK_VALUE(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == channels, op, ": ", arg,
                    " must have shape [2, ", channels, "], got ", sums.sizes());
  TORCH_CHECK_VALUE(sums.device() == like.device(), op, ": ", arg, " must be on ", like.device(), ", got ",
                    sums.device());
}

inline void check_bn_eval_backward(const char* op, const std::optional<Tensor>& grad_y, const Tensor& grad_sums,
                                   const Tensor& x, const Tensor& mean, const Tensor& var,
                                   const std::optional<Tensor>& weight, double eps) {
  check_bn_eval(op, x, mean, var, weight, eps);
  check_sums(op, "grad_sums", grad_sums, x, x.size(1));
  if (!grad_y) return;
  check_same(op, "grad_y", *grad_y, "x", x);
}

inline void check_stats_loss(const char* op, const Tensor& sums, const Tensor& var, int64_t count) {
  check_wide(op, "var", var);
  TORCH_CHECK_VALUE(var.dim() == 1 && var.size(0) > 0, op, ": var must have shape [C], got ", var.sizes());
  check_sums(op, "sums", sums, var, var.size(0));
  TORCH_CHECK_VALUE(count > 0, op, ": count must be positive, got ", count);
}

}  // namespace zsq
