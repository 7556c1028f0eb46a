"""Every operation of the library, in the dispatcher's schema language: the table of contents of the native code.

`csrc/ops` implements these names for CPU and CUDA and adds autograd; `zsq_fast.reference` holds the same functions in plain
PyTorch. `(a!)` marks an argument that is updated in place.
"""

NAMESPACE = "zsq"

SCHEMAS = (
    "fake_quant_weight(Tensor weight, int bits) -> Tensor",
    "weight_codes(Tensor weight, int bits) -> (Tensor codes, Tensor scale, Tensor lo_code)",
    "fake_quant_act(Tensor x, Tensor lo, Tensor hi, int bits) -> Tensor",
    "fake_quant_act_running(Tensor x, Tensor(a!) lo, Tensor(b!) hi, Tensor(c!) beta_t, int bits, float decay, bool plain)"
    " -> Tensor",
    "bn_stats_match(Tensor x, Tensor mean, Tensor var) -> (Tensor loss, Tensor batch_mean, Tensor batch_var)",
    "bn_stats_match_backward(Tensor grad_loss, Tensor x, Tensor mean, Tensor var, Tensor batch_mean, Tensor batch_var)"
    " -> Tensor",
    "gi_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!) kappa, Tensor(d!) changed, float lr,"
    " float momentum, bool nesterov, float weight_decay, int bits, float threshold, int search_steps, bool capped) -> ()",
)
