"""Every operation of the library, in the dispatcher's schema language: the table of contents of the native code.

`csrc/ops` implements these names for CPU and CUDA and adds autograd; `zsq_fast.reference` holds the same functions in plain
PyTorch. `(a!)` marks an argument that is updated in place.
"""

NAMESPACE = "zsq"

_BATCH_NORM = "Tensor mean, Tensor var, Tensor? weight"

SCHEMAS = (
    # fake_quant
    "fake_quant_weight(Tensor weight, int bits) -> Tensor",
    "fake_quant_weights(Tensor[] weights, int bits) -> Tensor[]",
    "weight_codes(Tensor weight, int bits) -> (Tensor codes, Tensor scale, Tensor lo_code)",
    "fake_quant_act(Tensor x, Tensor lo, Tensor hi, int bits) -> Tensor",
    "fake_quant_act_clip(Tensor x, Tensor lo, Tensor hi, int bits) -> (Tensor out, Tensor mask)",
    "masked(Tensor grad, Tensor mask) -> Tensor",
    "track_range_(Tensor x, Tensor(a!) lo, Tensor(b!) hi, Tensor(c!) beta_t, float decay, bool plain) -> ()",
    "fake_quant_act_running(Tensor x, Tensor(a!) lo, Tensor(b!) hi, Tensor(c!) beta_t, int bits, float decay, bool plain)"
    " -> Tensor",
    # learned_step
    "fake_quant_learned(Tensor x, Tensor step, int code_min, int code_max, float grad_factor) -> Tensor",
    "fake_quant_learned_backward(Tensor grad, Tensor x, Tensor step, int code_min, int code_max, float grad_factor)"
    " -> (Tensor grad_x, Tensor grad_step)",
    # bn_stats
    "bn_stats_match(Tensor x, Tensor mean, Tensor var) -> (Tensor loss, Tensor batch_mean, Tensor batch_var)",
    "bn_stats_match_backward(Tensor grad_loss, Tensor x, Tensor mean, Tensor var, Tensor batch_mean, Tensor batch_var)"
    " -> Tensor",
    f"bn_eval_sums(Tensor x, {_BATCH_NORM}, Tensor? bias, float eps) -> (Tensor y, Tensor sums)",
    f"bn_eval_sums_backward(Tensor? grad_y, Tensor grad_sums, Tensor x, {_BATCH_NORM}, float eps) -> Tensor",
    "bn_stats_loss(Tensor sums, Tensor var, int count) -> Tensor",
    "bn_stats_loss_backward(Tensor grad_loss, Tensor sums, Tensor var, int count) -> Tensor",
    # bn_act
    f"bn_act_fake_quant(Tensor x, Tensor? residual, {_BATCH_NORM}, Tensor? bias, float eps, str activation, Tensor lo,"
    " Tensor hi, int bits, bool clip) -> (Tensor out, Tensor mask)",
    f"bn_act_fake_quant_backward(Tensor grad, Tensor mask, Tensor x, {_BATCH_NORM}, float eps, bool residual, bool affine)"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    # losses
    "distillation_loss(Tensor student, Tensor? teacher, Tensor? target, float temperature, bool batchmean, float kd_weight,"
    " float ce_weight, float gamma, bool both) -> (Tensor loss, Tensor kd, Tensor ce, Tensor grad, Tensor grad_teacher)",
    "feature_alignment(Tensor student, Tensor teacher, str kind) -> (Tensor loss, Tensor student_map, Tensor teacher_map)",
    "feature_alignment_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor student_map, Tensor teacher_map,"
    " str kind, bool both) -> (Tensor grad_student, Tensor grad_teacher)",
    "sign_perturb(Tensor x, Tensor grad, float epsilon) -> Tensor",
    # gi_sgd
    "gi_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!) kappa, Tensor(d!) changed, float lr,"
    " float momentum, bool nesterov, float weight_decay, int bits, float threshold, int search_steps, bool capped,"
    " bool guaranteed) -> ()",
)
