// CUDA entries: check, device guard, current stream, allocate, launch, check the launch, return. Never waits for the
// device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../cuda/kernels.h"
#include "checks.h"

namespace zsq {
namespace {
// Makes the tensor's device current while it lives; `stream` is that device's current stream.
struct On {
  explicit On(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

// Calls launch with a value of the tensor's element type and throws if it fails.
template <class F>
void launch_typed(const Tensor& t, F launch) {
  C10_CUDA_CHECK(t.scalar_type() == at::kDouble ? launch(double{}) : launch(float{}));
}

// Freed on return although kernels still use it: the caching allocator hands it out again only behind them on the same
// stream.
Tensor workspace(const Tensor& like, size_t bytes) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

Tensor fake_quant_weight(const Tensor& weight_in, int64_t bits) {
  check_weight("fake_quant_weight", weight_in, bits);
  const On on(weight_in);
  const Tensor weight = with_dense_rows(weight_in);
  Tensor out = at::empty_like(weight);
  if (weight.numel() == 0) return out;
  launch_typed(weight, [&](auto zero) {
    using T = decltype(zero);
    return cuda::fake_quant_weight<T>(weight.const_data_ptr<T>(), out.mutable_data_ptr<T>(), weight.size(0),
                                      weight.numel() / weight.size(0), int(bits), on.stream);
  });
  return strided_as_result_of(weight_in, weight, out);
}

std::tuple<Tensor, Tensor, Tensor> weight_codes(const Tensor& weight_in, int64_t bits) {
  check_weight("weight_codes", weight_in, bits);
  const On on(weight_in);
  const Tensor weight = with_dense_rows(weight_in);
  Tensor codes = at::empty_like(weight), scale = at::empty({weight.size(0)}, weight.options());
  Tensor lo_code = at::empty_like(scale);
  if (weight.numel() == 0) return {codes, scale, lo_code};
  launch_typed(weight, [&](auto zero) {
    using T = decltype(zero);
    return cuda::weight_codes<T>(weight.const_data_ptr<T>(), codes.mutable_data_ptr<T>(), scale.mutable_data_ptr<T>(),
                                 lo_code.mutable_data_ptr<T>(), weight.size(0), weight.numel() / weight.size(0),
                                 int(bits), on.stream);
  });
  return {strided_as_result_of(weight_in, weight, codes), scale, lo_code};
}

Tensor fake_quant_act(const Tensor& x_in, const Tensor& lo, const Tensor& hi, int64_t bits) {
  check_act("fake_quant_act", x_in, lo, hi, bits);
  const On on(x_in);
  const Tensor x = dense(x_in);
  Tensor out = at::empty_like(x);
  launch_typed(x, [&](auto zero) {
    using T = decltype(zero);
    return cuda::fake_quant_act<T>(x.const_data_ptr<T>(), lo.const_data_ptr<T>(), hi.const_data_ptr<T>(),
                                   out.mutable_data_ptr<T>(), x.numel(), int(bits), on.stream);
  });
  return strided_as_result_of(x_in, x, out);
}

Tensor fake_quant_act_running(const Tensor& x_in, Tensor& lo, Tensor& hi, Tensor& beta_t, int64_t bits, double decay,
                              bool plain) {
  check_act_running("fake_quant_act_running", x_in, lo, hi, beta_t, bits, decay);
  const On on(x_in);
  const Tensor x = dense(x_in);
  Tensor out = at::empty_like(x), scratch = workspace(x, cuda::fake_quant_act_running_workspace(x.element_size()));
  launch_typed(x, [&](auto zero) {
    using T = decltype(zero);
    return cuda::fake_quant_act_running<T>(x.const_data_ptr<T>(), lo.mutable_data_ptr<T>(), hi.mutable_data_ptr<T>(),
                                           beta_t.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(), x.numel(),
                                           int(bits), decay, plain, scratch.mutable_data_ptr(), on.stream);
  });
  return strided_as_result_of(x_in, x, out);
}

std::tuple<Tensor, Tensor, Tensor> bn_stats_match(const Tensor& x, const Tensor& mean, const Tensor& var) {
  check_bn_stats("bn_stats_match", x, mean, var);
  const On on(x);
  const ChannelView v = channel_view(x);
  const Tensor m = mean.contiguous(), s = var.contiguous();
  Tensor loss = at::empty({}, x.options()), batch_mean = at::empty_like(m), batch_var = at::empty_like(m);
  Tensor scratch = workspace(x, cuda::bn_stats_workspace(v.n, v.c, v.s, v.channels_last, x.element_size()));
  launch_typed(x, [&](auto zero) {
    using T = decltype(zero);
    return cuda::bn_stats<T>(v.x.const_data_ptr<T>(), m.const_data_ptr<T>(), s.const_data_ptr<T>(),
                             loss.mutable_data_ptr<T>(), batch_mean.mutable_data_ptr<T>(),
                             batch_var.mutable_data_ptr<T>(), v.n, v.c, v.s, v.channels_last,
                             scratch.mutable_data_ptr(), on.stream);
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
  const On on(x);
  const ChannelView v = channel_view(x);
  const Tensor m = mean.contiguous(), s = var.contiguous(), bm = batch_mean.contiguous(), bv = batch_var.contiguous();
  Tensor grad_x = at::empty_like(v.x);
  launch_typed(x, [&](auto zero) {
    using T = decltype(zero);
    return cuda::bn_stats_backward<T>(grad_loss.const_data_ptr<T>(), v.x.const_data_ptr<T>(), m.const_data_ptr<T>(),
                                      s.const_data_ptr<T>(), bm.const_data_ptr<T>(), bv.const_data_ptr<T>(),
                                      grad_x.mutable_data_ptr<T>(), v.n, v.c, v.s, v.channels_last, on.stream);
  });
  return strided_as_result_of(x, v.x, grad_x);
}

void gi_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, Tensor& kappa, Tensor& changed,
             double lr, double momentum, bool nesterov, double weight_decay, int64_t bits, double threshold,
             int64_t search_steps, bool capped) {
  const GiOptions options{lr, momentum, weight_decay, threshold, int(bits), int(search_steps), nesterov, capped};
  check_gi_sgd(weights, grads, momenta, kappa, changed, options);
  const On on(weights[0]);
  const GiViews views(weights, grads, momenta);
  const auto tensors = views.tensors<cuda::GiTensor>();
  const int count = int(tensors.size());
  Tensor scratch = workspace(weights[0], cuda::gi_sgd_workspace(count));
  C10_CUDA_CHECK(cuda::gi_sgd(tensors.data(), count, kappa.mutable_data_ptr<float>(),
                              changed.mutable_data_ptr<int64_t>(), options, scratch.mutable_data_ptr(), on.stream));
  views.write_back();
}
}  // namespace

TORCH_LIBRARY_IMPL(zsq, CUDA, m) {
  m.impl("fake_quant_weight", fake_quant_weight);
  m.impl("weight_codes", weight_codes);
  m.impl("fake_quant_act", fake_quant_act);
  m.impl("fake_quant_act_running", fake_quant_act_running);
  m.impl("bn_stats_match", bn_stats_match);
  m.impl("bn_stats_match_backward", bn_stats_match_backward);
  m.impl("gi_sgd_", gi_sgd_);
}
}  // namespace zsq
