#pragma once
#include "../../loss_math.h"
#include "../checks.h"

namespace zsq {
inline void check_distillation(const char* op, const Tensor& student, const std::optional<Tensor>& teacher,
                               const std::optional<Tensor>& target, const DistillationOptions& o) {
  check_float(op, "student", student);
  TORCH_CHECK_VALUE(student.dim() == 2 && student.numel() > 0, op,
                    ": student must have shape [B, C] and not be empty, got ", student.sizes());
  if (teacher) {
    check_same(op, "teacher", *teacher, "student", student);
  }
  if (target) {
    TORCH_CHECK_TYPE(target->scalar_type() == at::kLong, op, ": target must be int64, got ", target->scalar_type());
    TORCH_CHECK_VALUE(target->device() == student.device(), op, ": target must be on the device of student (",
                      student.device(), "), got ", target->device());
    TORCH_CHECK_VALUE(target->dim() == 1 && target->size(0) == student.size(0), op, ": target must have shape [",
                      student.size(0), "], got ", target->sizes());
  }
  TORCH_CHECK_VALUE(std::isfinite(o.temperature) && o.temperature > 0, op,
                    ": temperature must be positive and finite, got ", o.temperature);
  for (const auto& [name, weight] : {std::pair{"kd_weight", o.kd_weight}, {"ce_weight", o.ce_weight}})
    TORCH_CHECK_VALUE(std::isfinite(weight), op, ": ", name, " must be finite, got ", weight);
  TORCH_CHECK_VALUE(std::isfinite(o.gamma) && o.gamma >= 0, op, ": gamma must be at least 0 and finite, got ", o.gamma);
}

inline Alignment check_alignment(const char* op, const Tensor& student, const Tensor& teacher, c10::string_view kind) {
  check_float(op, "student", student);
  TORCH_CHECK_VALUE(student.dim() >= 2 && student.numel() > 0, op,
                    ": student must have shape [N, C, ...] and not be empty, got ", student.sizes());
  check_same(op, "teacher", teacher, "student", student);
  if (kind == "channel") return Alignment::kChannel;
  if (kind == "spatial") return Alignment::kSpatial;
  TORCH_CHECK_VALUE(kind == "direct", op, ": kind must be 'channel', 'spatial' or 'direct', got '", kind, "'");
  return Alignment::kDirect;
}
inline std::vector<int64_t> map_sizes(const ChannelView& v, Alignment kind) {
  if (kind == Alignment::kDirect) return {0};
  return {v.n, map_shape(v.shape(), kind).size};
}
inline void check_map(const char* op, const char* arg, const Tensor& map, const Tensor& student,
                      at::IntArrayRef sizes) {
  check_param(op, arg, map, "student", student);
  TORCH_CHECK_VALUE(map.sizes() == sizes, op, ": ", arg, " must have shape ", sizes, ", got ", map.sizes());
}

inline void check_perturb(const char* op, const Tensor& x, const Tensor& grad, double epsilon) {
  check_float(op, "x", x);
  check_same(op, "grad", grad, "x", x);
  TORCH_CHECK_VALUE(std::isfinite(epsilon), op, ": epsilon must be finite, got ", epsilon);
}
}  // namespace zsq
