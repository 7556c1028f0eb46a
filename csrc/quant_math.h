// The scalar rules of the project, written once for host and device. No Torch, no CUDA headers.
//
// Every product, sum and quotient is rounded exactly once: device code uses the _rn intrinsics (ptxas may not
// contract them), host code must be built with -ffp-contract=off. Integer codes then agree bit for bit on every device.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ZSQ_HD __host__ __device__ __forceinline__
#else
// Internal linkage: this header is compiled once per instruction set, and a function shared between the objects would
// be whichever copy the linker takes, perhaps one that this processor cannot run.
#define ZSQ_HD static inline __attribute__((always_inline))
#endif

namespace zsq {

#ifdef __CUDA_ARCH__
ZSQ_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ZSQ_HD float add(float a, float b) { return __fadd_rn(a, b); }
ZSQ_HD float sub(float a, float b) { return __fsub_rn(a, b); }
ZSQ_HD float quot(float a, float b) { return __fdiv_rn(a, b); }
ZSQ_HD double mul(double a, double b) { return __dmul_rn(a, b); }
ZSQ_HD double add(double a, double b) { return __dadd_rn(a, b); }
ZSQ_HD double sub(double a, double b) { return __dsub_rn(a, b); }
ZSQ_HD double quot(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class T>
ZSQ_HD T mul(T a, T b) {
  return a * b;
}
template <class T>
ZSQ_HD T add(T a, T b) {
  return a + b;
}
template <class T>
ZSQ_HD T sub(T a, T b) {
  return a - b;
}
template <class T>
ZSQ_HD T quot(T a, T b) {
  return a / b;
}
#endif

// Half to even in the default rounding mode, one instruction on every target.
ZSQ_HD float round_even(float x) { return rintf(x); }
ZSQ_HD double round_even(double x) { return rint(x); }

// Asymmetric uniform grid of 2^bits codes over [lo, hi] (ZeroQ/GDFQ quantizer; specs: ait_family.md section 2):
//   scale = (2^bits - 1) / max(hi - lo, 1e-8)          codes per unit
//   zero_point = round(scale*lo) + 2^(bits-1)          integral, shifted to the signed code range
template <class T>
struct Grid {
  T scale, zero_point, code_min, code_max;
};

template <class T>
ZSQ_HD Grid<T> make_grid(T lo, T hi, int bits) {
  const T width = sub(hi, lo);
  const T half = T(1 << (bits - 1));
  // Written so that a NaN width stays NaN, and that a range whose ends are swapped becomes one: neither may turn into
  // plausible numbers. Reciprocal times number, two roundings: what PyTorch computes for `number / tensor`, hence what
  // the golden vectors hold.
  const T least = width < T(0) ? T(NAN) : T(1e-8);
  const T scale = mul(quot(T(1), width < T(1e-8) ? least : width), T((1 << bits) - 1));
  return {scale, add(round_even(mul(scale, lo)), half), -half, half - 1};
}

// code = clamp(round(scale*x - zero_point)). Both comparisons are written so that NaN passes, which is also the operand
// order in which a compiler may use one minimum and one maximum instruction.
template <class T>
ZSQ_HD T encode(T x, const Grid<T>& g) {
  const T q = round_even(sub(mul(g.scale, x), g.zero_point));
  const T above = g.code_min > q ? g.code_min : q;
  return g.code_max < above ? g.code_max : above;
}
// Whether `encode` leaves the code as it is. NaN is clamped in this sense.
template <class T>
ZSQ_HD bool not_clamped(T x, const Grid<T>& g) {
  const T q = round_even(sub(mul(g.scale, x), g.zero_point));
  return (q >= g.code_min) & (q <= g.code_max);
}
template <class T>
ZSQ_HD T decode(T code, const Grid<T>& g) {
  return quot(add(code, g.zero_point), g.scale);
}
template <class T>
ZSQ_HD T fake_quant(T x, const Grid<T>& g) {
  return decode(encode(x, g), g);
}

// `beta_before` for `track`. A product that no decay has (outside [0, 1]) becomes NaN, and with it the range.
template <class T>
ZSQ_HD T checked_beta(T beta_before) {
  return (beta_before >= T(0)) & (beta_before <= T(1)) ? beta_before : T(NAN);
}

// Running range of an activation (decay = 0.9). `beta_t` is the decay's running product after this update.
// reference: the bias-corrected value is fed back as the state (the published code); plain: an EMA with the usual
// correction. The range is undefined before the first update (beta_before == 1). 1 - decay is rounded in T, as in the
// published code.
template <class T>
ZSQ_HD T track(T state, T seen, T beta_before, T beta_t, T decay, bool plain) {
  T kept = beta_before == T(1) ? T(0) : state;
  if (plain) kept = mul(kept, sub(T(1), beta_before));
  return quot(add(mul(decay, kept), mul(sub(T(1), decay), seen)), sub(T(1), beta_t));
}

// Learned step sizes (LSQ, Esser et al. 2020, eq. 1 to 3). NaN passes, as in `encode`. A step that training has driven
// to zero or below is none: NaN.
template <class T>
ZSQ_HD T checked_step(T step) {
  return step > T(0) ? step : T(NAN);
}
template <class T>
ZSQ_HD T clamp_code(T x, T code_min, T code_max) {
  const T above = code_min > x ? code_min : x;
  return code_max < above ? code_max : above;
}
template <class T>
ZSQ_HD T learned_value(T x, T step, T code_min, T code_max) {
  return mul(clamp_code(round_even(quot(x, step)), code_min, code_max), step);
}
// d(value)/d(step) from position = x / step and code = clamp_code(position); the gradient of x passes where the two are
// equal, which a NaN is not.
template <class T>
ZSQ_HD T learned_slope(T position, T code) {
  return code == position ? sub(round_even(position), position) : code;
}

// Gradient inundation (AIT section 7.2): one bisection path over kappa, replayed from counts by CPU and CUDA alike.
constexpr int kGiMaxDoublings = 30;  // kappa <= 2^30: a tensor that never reaches the threshold falls back to kappa = 1
constexpr int kGiCappedDoublings = 7;  // "capped" stops doubling at 128, the first power of two above 100
constexpr int kGiMaxSearchSteps = 5;

// share = count/numel as an fp32 quotient of two fp32 numbers, compared in fp32: what the published code computes.
ZSQ_HD float gi_share(int64_t count, int64_t numel) { return quot(float(count), float(numel)); }
ZSQ_HD bool gi_close(float share, double threshold) {
  return fabsf(sub(share, float(threshold))) < float(threshold / 100.0);
}

struct GiOptions {
  double lr, momentum, weight_decay, threshold;
  int bits, search_steps;
  bool nesterov, capped, guaranteed;
};

// Step direction without weight decay, used by the search: b = momentum*v + g; d = g + momentum*b (Nesterov) or b.
ZSQ_HD float gi_direction(float grad, float velocity, float momentum, bool nesterov) {
  const float b = add(mul(momentum, velocity), grad);
  return nesterov ? add(grad, mul(momentum, b)) : b;
}
ZSQ_HD float gi_moved(float weight, float step, float direction) { return sub(weight, mul(step, direction)); }

}  // namespace zsq
