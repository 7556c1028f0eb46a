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
bool wants_grad(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }
}  // namespace
}  // namespace zsq

#include "bn_act/autograd.inc"
#include "bn_stats/autograd.inc"
#include "fake_quant/autograd.inc"
#include "gi_sgd/autograd.inc"
#include "learned_step/autograd.inc"
#include "losses/autograd.inc"
