// Scalar rules of the losses, host and device. Per row or sample, hence in double.
#pragma once
#include "args.h"

namespace zsq {

// Hard-sample cross entropy of one row (HAST eq. 8), (1 - p)^gamma * -log p, from z_y = logit - max and
// log_z = log(sum(exp(logits - max))). Its gradient is slope * (softmax - onehot); 1 - p is kept above 1e-6, where the
// weight is constant.
struct CrossEntropy {
  double loss, slope, miss;  // miss = 1 - p
};
ZSQ_HD CrossEntropy cross_entropy(double z_y, double log_z, double gamma) {
  const double nll = log_z - z_y, miss = -expm1(-nll);
  if (gamma == 0) return {nll, 1, miss};
  const double kept = miss < 1e-6 ? 1e-6 : miss, weight = pow(kept, gamma);
  const double slope = miss < 1e-6 ? weight : weight + nll * gamma * (weight / kept) * (1 - miss);
  return {weight * nll, slope, miss};
}

// Features as [n, outer, inner] in memory, and the axis over which a map takes the mean of squares.
struct MapShape {
  int64_t n, outer, inner;
  bool over_inner;
  int64_t size, count;  // values of a map per sample; values behind each
};
ZSQ_HD MapShape map_shape(const Plane& p, Alignment kind) {
  const int64_t outer = p.channels_last ? p.s : p.c, inner = p.channels_last ? p.c : p.s;
  const bool over_inner = (kind == Alignment::kChannel) != p.channels_last;
  return {p.n, outer, inner, over_inner, over_inner ? outer : inner, over_inner ? inner : outer};
}

// Two maps a and b of a sample: the lengths they are divided by (at least 1e-12, as torch.nn.functional.normalize) and
// the products of the divided maps.
struct MapProducts {
  double a, b, aa, ab, bb;
};
ZSQ_HD MapProducts products_of(double aa, double bb, double ab) {
  const double root_a = sqrt(aa), root_b = sqrt(bb);
  const double a = root_a < 1e-12 ? 1e-12 : root_a, b = root_b < 1e-12 ? 1e-12 : root_b;
  return {a, b, aa / a / a, ab / a / b, bb / b / b};
}
// With d = a/|a| - b/|b| and the loss mean(d^2): what to multiply a feature x with for its gradient, from its value in
// the map a. A length held at its minimum is a constant.
ZSQ_HD double map_unit(double grad_loss, const MapShape& m) {
  return 2 * grad_loss / (double(m.n) * double(m.size)) * (2 / double(m.count));
}
ZSQ_HD double map_factor(double a, double b, const MapProducts& p, double unit) {
  const double along = p.a <= 1e-12 ? 0 : p.aa - p.ab;
  return unit * ((a / p.a - b / p.b) - a / p.a * along) / p.a;
}

// NaN stays, unlike in torch.sign.
template <class T>
ZSQ_HD T sign_of(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;
}

}  // namespace zsq
