// Batch norm in eval mode, what its statistics miss, and activation with fake quantization: scalar rules, host and
// device.
#pragma once
#include "args.h"

namespace zsq {

ZSQ_HD float root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return sqrtf(x);
#endif
}
ZSQ_HD double root(double x) { return sqrt(x); }

// x*scale + shift. The null pointers stand for weight 1 and bias 0.
template <class W>
struct Affine {
  W scale, shift;
};
template <class W>
ZSQ_HD Affine<W> bn_affine(const W* mean, const W* var, const W* weight, const W* bias, W eps, int64_t c) {
  const W scale = quot(weight ? weight[c] : W(1), root(add(var[c], eps)));
  return {scale, sub(bias ? bias[c] : W(0), mul(mean[c], scale))};
}

// How far the mean and the biased variance of channel c are off, from its sums of (x - mean) and (x - mean)^2, [2, C],
// over `count` values.
struct BnMiss {
  double mean, var;
};
template <class W>
ZSQ_HD BnMiss bn_miss(const double* sums, const W* var, int64_t channels, int64_t count, int64_t c) {
  const double shift = quot(sums[c], double(count)), square = quot(sums[channels + c], double(count));
  return {shift, sub(sub(square, mul(shift, shift)), double(var[c]))};
}

// Activation and fake quantization. An open side passes everything, NaN included.
template <class W>
struct ActRule {
  Grid<W> grid;
  W floor, ceiling;
  bool open_below, open_above, clip;
};
template <class W>
ZSQ_HD ActRule<W> act_rule(Activation activation, bool clip, W lo, W hi, int bits) {
  const bool relu = activation != Activation::kNone, relu6 = activation == Activation::kRelu6;
  return {make_grid(lo, hi, bits), relu ? W(0) : -W(INFINITY), relu6 ? W(6) : W(INFINITY), !relu, !relu6, clip};
}
// Code of y; keep says whether it passes a gradient. No short circuits: host compilers vectorise this.
template <class W>
ZSQ_HD W act_encode(W y, const ActRule<W>& r, bool* keep) {
  bool pass = (y > r.floor) | r.open_below;
  y = y < r.floor ? r.floor : y;
  pass &= (y < r.ceiling) | r.open_above;
  y = y > r.ceiling ? r.ceiling : y;
  const W q = round_even(sub(mul(r.grid.scale, y), r.grid.zero_point));
  *keep = pass & (((q >= r.grid.code_min) & (q <= r.grid.code_max)) | !r.clip);
  const W above = r.grid.code_min > q ? r.grid.code_min : q;
  return r.grid.code_max < above ? r.grid.code_max : above;
}

}  // namespace zsq
