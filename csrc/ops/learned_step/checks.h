#pragma once
#include "../checks.h"

namespace zsq {
inline void check_learned(const char* op, const Tensor& x, const Tensor& step, int64_t code_min, int64_t code_max,
                          double grad_factor) {
  check_float(op, "x", x);
  check_param(op, "step", step, "x", x);
  TORCH_CHECK_VALUE(step.numel() == 1 || (step.dim() == 1 && x.dim() >= 1 && step.size(0) == x.size(0)), op,
                    ": step must have one element or one per row of x, [", x.dim() ? x.size(0) : 1, "], got shape ",
                    step.sizes());
  // Codes are held in the arithmetic type of x; float has 24 bits.
  TORCH_CHECK_VALUE(code_min < code_max && code_min >= -(1 << 24) && code_max <= 1 << 24, op,
                    ": code_min must lie below code_max, both within 2^24, got ", code_min, " and ", code_max);
  TORCH_CHECK_VALUE(std::isfinite(grad_factor), op, ": grad_factor must be finite, got ", grad_factor);
}

// x as [rows, cols] with one step per row.
struct SteppedRows {
  Tensor x;
  int64_t rows, cols;
};
inline SteppedRows stepped_rows(const Tensor& x, const Tensor& step) {
  if (step.numel() == 1) return {dense(x), 1, x.numel()};
  return {with_dense_rows(x), step.numel(), step.numel() ? x.numel() / step.numel() : 0};
}
}  // namespace zsq
