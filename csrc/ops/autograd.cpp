// Autograd of every differentiable operation, device independent, in C++: on CIFAR-sized layers the cost of dispatch
// decides. The straight-through estimator of this family is the identity: no mask, no saved tensor (ait_family.md
// section 2).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace zsq {
namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Autograd then refuses a backward pass that saved the old value.
void mark_changed(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

Tensor call_weight(const Tensor& weight, int64_t bits) {
  static const auto op = find<Tensor(const Tensor&, int64_t)>("zsq::fake_quant_weight");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(weight, bits);
}
Tensor call_act(const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>("zsq::fake_quant_act");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, lo, hi, bits);
}
Tensor call_running(const Tensor& x, Tensor& lo, Tensor& hi, Tensor& beta_t, int64_t bits, double decay, bool plain) {
  static const auto op =
      find<Tensor(const Tensor&, Tensor&, Tensor&, Tensor&, int64_t, double, bool)>("zsq::fake_quant_act_running");
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, lo, hi, beta_t, bits, decay, plain);
  }();
  for (const Tensor& t : {lo, hi, beta_t}) mark_changed(t);
  return out;
}
std::tuple<Tensor, Tensor, Tensor> call_bn_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>("zsq::bn_stats_match");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, mean, var);
}
bool wants_grad(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }

struct WeightFunction : torch::autograd::Function<WeightFunction> {
  static Tensor forward(AutogradContext*, const Tensor& weight, int64_t bits) { return call_weight(weight, bits); }
  static variable_list backward(AutogradContext*, variable_list grad) { return {grad[0], Tensor()}; }
};
struct ActFunction : torch::autograd::Function<ActFunction> {
  static Tensor forward(AutogradContext*, const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
    return call_act(x, lo, hi, bits);
  }
  static variable_list backward(AutogradContext*, variable_list grad) {
    return {grad[0], Tensor(), Tensor(), Tensor()};
  }
};
struct RunningFunction : torch::autograd::Function<RunningFunction> {
  static Tensor forward(AutogradContext*, const Tensor& x, Tensor lo, Tensor hi, Tensor beta_t, int64_t bits,
                        double decay, bool plain) {
    return call_running(x, lo, hi, beta_t, bits, decay, plain);
  }
  static variable_list backward(AutogradContext*, variable_list grad) {
    return {grad[0], Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};
struct BnStatsFunction : torch::autograd::Function<BnStatsFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& mean, const Tensor& var) {
    auto [loss, batch_mean, batch_var] = call_bn_stats(x, mean, var);
    ctx->save_for_backward({x, mean, var, batch_mean, batch_var});
    ctx->mark_non_differentiable({batch_mean, batch_var});
    return {loss, batch_mean, batch_var};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grad) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "zsq::bn_stats_match_backward");
    const auto s = ctx->get_saved_variables();
    return {op.call(grad[0], s[0], s[1], s[2], s[3], s[4]), Tensor(), Tensor()};
  }
};

Tensor fake_quant_weight(const Tensor& weight, int64_t bits) {
  return wants_grad(weight) ? WeightFunction::apply(weight, bits) : call_weight(weight, bits);
}
Tensor fake_quant_act(const Tensor& x, const Tensor& lo, const Tensor& hi, int64_t bits) {
  return wants_grad(x) ? ActFunction::apply(x, lo, hi, bits) : call_act(x, lo, hi, bits);
}
Tensor fake_quant_act_running(const Tensor& x, Tensor& lo, Tensor& hi, Tensor& beta_t, int64_t bits, double decay,
                              bool plain) {
  return wants_grad(x) ? RunningFunction::apply(x, lo, hi, beta_t, bits, decay, plain)
                       : call_running(x, lo, hi, beta_t, bits, decay, plain);
}
std::tuple<Tensor, Tensor, Tensor> bn_stats_match(const Tensor& x, const Tensor& mean, const Tensor& var) {
  if (!wants_grad(x)) return call_bn_stats(x, mean, var);
  const auto out = BnStatsFunction::apply(x, mean, var);
  return {out[0], out[1], out[2]};
}

void gi_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, Tensor& kappa, Tensor& changed,
             double lr, double momentum, bool nesterov, double weight_decay, int64_t bits, double threshold,
             int64_t search_steps, bool capped) {
  static const auto op = find<void(at::TensorList, at::TensorList, at::TensorList, Tensor&, Tensor&, double, double,
                                   bool, double, int64_t, double, int64_t, bool)>("zsq::gi_sgd_");
  for (const Tensor& w : weights)
    TORCH_CHECK(!wants_grad(w),
                "gi_sgd_: weights that require grad are updated in place; call it under torch.no_grad()");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(weights, grads, momenta, kappa, changed, lr, momentum, nesterov, weight_decay, bits, threshold,
            search_steps, capped);
  }
  for (const auto list : {weights, momenta})
    for (const Tensor& t : list) mark_changed(t);
  mark_changed(kappa);
  mark_changed(changed);
}
}  // namespace

TORCH_LIBRARY_IMPL(zsq, Autograd, m) {
  m.impl("fake_quant_weight", fake_quant_weight);
  m.impl("fake_quant_act", fake_quant_act);
  m.impl("fake_quant_act_running", fake_quant_act_running);
  m.impl("bn_stats_match", bn_stats_match);
  m.impl("gi_sgd_", gi_sgd_);
}
}  // namespace zsq
