#pragma once
#include "../checks.h"

namespace zsq {
// An element of a tensor list against its weight; the name is put together only when it is needed.
inline void check_item(const char* op, const char* list, size_t i, const Tensor& t, const Tensor& weight) {
  if (t.scalar_type() != weight.scalar_type() || t.device() != weight.device())
    check_like(op, (std::string(list) + "[" + std::to_string(i) + "]").c_str(), t, "its weight", weight);
}

// What a step writes must not share memory: each tensor would see the other's half-done step.
inline void check_apart(const char* op, at::TensorList weights, at::TensorList momenta) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const auto list : {weights, momenta})
    for (const Tensor& t : list) {
      if (t.numel() == 0 || !t.is_non_overlapping_and_dense()) continue;
      const auto* begin = static_cast<const char*>(t.const_data_ptr());
      ranges.emplace_back(begin, begin + t.nbytes());
    }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    TORCH_CHECK_VALUE(ranges[i - 1].second <= ranges[i].first, op,
                      ": weights and momenta must not share memory, got tensors that overlap");
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
  check_apart(op, weights, momenta);
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
