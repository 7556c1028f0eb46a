// CPU entries: check, allocate, call the kernel, return.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../cpu/kernels.h"
#include "checks.h"

namespace zsq {
namespace {
int threads() { return at::get_num_threads(); }

// Calls f with a value of the tensor's element type.
template <class F>
auto by_type(const Tensor& t, F f) {
  return t.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

Tensor fake_quant_weight(const Tensor& weight_in, int64_t bits) {
  check_weight("fake_quant_weight", weight_in, bits);
  const Tensor weight = with_dense_rows(weight_in);
  Tensor out = at::empty_like(weight);
  if (weight.numel() == 0) return out;
  by_type(weight, [&](auto zero) {
    using T = decltype(zero);
    cpu::typed<T>(cpu::kernels())
        .fake_quant_weight(weight.const_data_ptr<T>(), out.mutable_data_ptr<T>(), weight.size(0),
                           weight.numel() / weight.size(0), int(bits), threads());
  });
  return strided_as_result_of(weight_in, weight, out);
}

std::tuple<Tensor, Tensor, Tensor> weight_codes(const Tensor& weight_in, int64_t bits) {
  check_weight("weight_codes", weight_in, bits);
  const Tensor weight = with_dense_rows(weight_in);
  Tensor codes = at::empty_like(weight), scale = at::empty({weight.size(0)}, weight.options()),
         lo_code = at::empty_like(scale);
  if (weight.numel() == 0) return {codes, scale, lo_code};
  by_type(weight, [&](auto zero) {
    using T = decltype(zero);
    cpu::typed<T>(cpu::kernels())
        .weight_codes(weight.const_data_ptr<T>(), codes.mutable_data_ptr<T>(), scale.mutable_data_ptr<T>(),
                      lo_code.mutable_data_ptr<T>(), weight.size(0), weight.numel() / weight.size(0), int(bits),
                      threads());
  });
  return {strided_as_result_of(weight_in, weight, codes), scale, lo_code};
}

Tensor fake_quant_act(const Tensor& x_in, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_act("fake_quant_act", x_in, lo, hi, bits);
  const Tensor x = dense(x_in);
  Tensor out = at::empty_like(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::typed<T>(cpu::kernels())
        .fake_quant_act(x.const_data_ptr<T>(), *lo.const_data_ptr<T>(), *hi.const_data_ptr<T>(),
                        out.mutable_data_ptr<T>(), x.numel(), int(bits), threads());
  });
  return strided_as_result_of(x_in, x, out);
}

Tensor fake_quant_act_running(const Tensor& x_in, Tensor& lo, Tensor& hi, Tensor& beta_t, int64_t bits, double decay,
                              bool plain) {
  check_act_running("fake_quant_act_running", x_in, lo, hi, beta_t, bits, decay);
  const Tensor x = dense(x_in);
  Tensor out = at::empty_like(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto& k = cpu::typed<T>(cpu::kernels());
    T seen_lo, seen_hi;
    k.min_max(x.const_data_ptr<T>(), x.numel(), &seen_lo, &seen_hi, threads());
    T &state_lo = *lo.mutable_data_ptr<T>(), &state_hi = *hi.mutable_data_ptr<T>(),
      &beta = *beta_t.mutable_data_ptr<T>();
    const T before = beta, d = T(decay);
    beta = mul(before, d);
    state_lo = track(state_lo, seen_lo, before, beta, d, plain);
    state_hi = track(state_hi, seen_hi, before, beta, d, plain);
    k.fake_quant_act(x.const_data_ptr<T>(), state_lo, state_hi, out.mutable_data_ptr<T>(), x.numel(), int(bits),
                     threads());
  });
  return strided_as_result_of(x_in, x, out);
}

std::tuple<Tensor, Tensor, Tensor> bn_stats_match(const Tensor& x, const Tensor& mean, const Tensor& var) {
  check_bn_stats("bn_stats_match", x, mean, var);
  const ChannelView v = channel_view(x);
  const Tensor m = mean.contiguous(), s = var.contiguous();
  Tensor loss = at::empty({}, x.options()), batch_mean = at::empty_like(m), batch_var = at::empty_like(m);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::typed<T>(cpu::kernels())
        .bn_stats({v.x.const_data_ptr<T>(),
                   m.const_data_ptr<T>(),
                   s.const_data_ptr<T>(),
                   loss.mutable_data_ptr<T>(),
                   batch_mean.mutable_data_ptr<T>(),
                   batch_var.mutable_data_ptr<T>(),
                   {v.n, v.c, v.s, v.channels_last}},
                  threads());
  });
  return {loss, batch_mean, batch_var};
}

Tensor bn_stats_match_backward(const Tensor& grad_loss, const Tensor& x, const Tensor& mean, const Tensor& var,
                               const Tensor& batch_mean, const Tensor& batch_var) {
  const char* op = "bn_stats_match_backward";
  check_bn_stats(op, x, mean, var);
  check_scalar(op, "grad_loss", grad_loss, "x", x);
  check_channels(op, "batch_mean", batch_mean, x);
  check_channels(op, "batch_var", batch_var, x);
  const ChannelView v = channel_view(x);
  const Tensor m = mean.contiguous(), s = var.contiguous(), bm = batch_mean.contiguous(), bv = batch_var.contiguous();
  Tensor grad_x = at::empty_like(v.x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::typed<T>(cpu::kernels())
        .bn_stats_backward({grad_loss.const_data_ptr<T>(),
                            v.x.const_data_ptr<T>(),
                            m.const_data_ptr<T>(),
                            s.const_data_ptr<T>(),
                            bm.const_data_ptr<T>(),
                            bv.const_data_ptr<T>(),
                            grad_x.mutable_data_ptr<T>(),
                            {v.n, v.c, v.s, v.channels_last}},
                           threads());
  });
  return strided_as_result_of(x, v.x, grad_x);
}

void gi_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, Tensor& kappa, Tensor& changed,
             double lr, double momentum, bool nesterov, double weight_decay, int64_t bits, double threshold,
             int64_t search_steps, bool capped) {
  const GiOptions options{lr, momentum, weight_decay, threshold, int(bits), int(search_steps), nesterov, capped};
  check_gi_sgd(weights, grads, momenta, kappa, changed, options);
  const GiViews views(weights, grads, momenta);
  const auto tensors = views.tensors<cpu::GiTensor>();
  cpu::kernels().gi_sgd(tensors.data(), int64_t(tensors.size()), options, kappa.mutable_data_ptr<float>(),
                        changed.mutable_data_ptr<int64_t>(), threads());
  views.write_back();
}
}  // namespace

TORCH_LIBRARY_IMPL(zsq, CPU, m) {
  m.impl("fake_quant_weight", fake_quant_weight);
  m.impl("weight_codes", weight_codes);
  m.impl("fake_quant_act", fake_quant_act);
  m.impl("fake_quant_act_running", fake_quant_act_running);
  m.impl("bn_stats_match", bn_stats_match);
  m.impl("bn_stats_match_backward", bn_stats_match_backward);
  m.impl("gi_sgd_", gi_sgd_);
}
}  // namespace zsq
