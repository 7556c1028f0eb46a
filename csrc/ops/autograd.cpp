// Autograd of every differentiable operation, device independent, in C++: on CIFAR-sized layers the cost of dispatch
// decides. The straight-through estimator of this family is the identity: no mask, no saved tensor (ait_family.md
// section 2).
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
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
bool wants_grad(const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(),
                              "zsq: no forward-mode derivative of this operation; use reverse mode");  // else it were 0
  return at::GradMode::is_enabled() && t.requires_grad();
}

// The fused backward passes have no derivative. Without this autograd would take their results for constants.
void first_derivative_only(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size()))
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || !wants_grad(value.toTensor()), op.schema().name(),
                                ": no second derivative; differentiate without create_graph");
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}
}  // namespace

TORCH_LIBRARY_IMPL(zsq, Autograd, m) {
  for (const char* op : {"bn_act_fake_quant_backward", "bn_eval_sums_backward", "bn_stats_loss_backward",
                         "bn_stats_match_backward", "fake_quant_learned_backward", "feature_alignment_backward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&first_derivative_only>());
}
}  // namespace zsq

#include "bn_act/autograd.inc"
#include "bn_stats/autograd.inc"
#include "fake_quant/autograd.inc"
#include "gi_sgd/autograd.inc"
#include "learned_step/autograd.inc"
#include "losses/autograd.inc"
