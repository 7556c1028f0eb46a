#pragma once
#include <string_view>

#include "../checks.h"

namespace zsq {
inline Activation parse_activation(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(name == "relu" || name == "relu6" || name == "none", op,
                    ": activation must be 'relu', 'relu6' or 'none', got '", name, "'");
  return name == "relu" ? Activation::kRelu : name == "relu6" ? Activation::kRelu6 : Activation::kNone;
}

inline void check_bn(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  check_feature_map(op, x);
  check_eps(op, eps);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  if (weight) check_channels(op, "weight", *weight, x);
  if (bias) check_channels(op, "bias", *bias, x);
}

inline void check_bn_act(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& mean,
                         const Tensor& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         double eps, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_bits(op, bits);
  check_bn(op, x, mean, var, weight, bias, eps);
  if (residual) check_same(op, "residual", *residual, "x", x);
  check_scalar(op, "lo", lo, "x", x);
  check_scalar(op, "hi", hi, "x", x);
}

inline void check_bn_act_backward(const char* op, const Tensor& grad, const Tensor& mask, const Tensor& x,
                                  const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                  double eps) {
  check_bn(op, x, mean, var, weight, std::nullopt, eps);
  check_same(op, "grad", grad, "x", x);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, op, ": mask must be uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.device() == x.device(), op, ": mask must be on the device of x (", x.device(), "), got ",
                    mask.device());
  const int64_t bytes = (x.numel() + 7) / 8;
  TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == bytes, op, ": mask must have shape [", bytes,
                    "] (one bit per element of x), got ", mask.sizes());
}

// A dense tensor is planes of channels in whatever order its other dimensions are: the channel's stride is the size of
// a plane. Walking that order keeps every layout, and the mask in the order of memory.
inline Plane plane_of(const Tensor& dense) {
  const int64_t c = dense.size(1), n = dense.numel();
  if (c <= 1 || n == 0) return {n ? 1 : 0, c, n, false};
  const int64_t s = dense.stride(1);
  return {n / (c * s), c, s, s == 1};
}

inline Tensor mask_for(const Tensor& x) { return at::empty({(x.numel() + 7) / 8}, x.options().dtype(at::kByte)); }
}  // namespace zsq
