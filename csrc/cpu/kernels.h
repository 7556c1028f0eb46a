// CPU kernels on raw pointers, one table per instruction set. No Torch headers.
#pragma once
#include <cstdint>

#include "../quant_math.h"

namespace zsq::cpu {

// x [N, C, S] with the channel's stride either S (NCHW) or 1 (channels_last, S being the product of spatial sizes).
struct Plane {
  int64_t n, c, s;
  bool channels_last;
};

template <class T>
struct BnStatsArgs {
  const T *x, *mean, *var;           // [N,C,S], [C], [C]: running statistics to match
  T *loss, *batch_mean, *batch_var;  // [], [C], [C]
  Plane shape;
};

template <class T>
struct BnStatsBackwardArgs {
  const T *grad_loss, *x, *mean, *var, *batch_mean, *batch_var;  // [], [N,C,S], [C] x 4
  T* grad_x;                                                     // [N,C,S], layout of x
  Plane shape;
};

struct GiTensor {
  float* weight;      // [rows, cols]
  const float* grad;  // [rows, cols]
  float* momentum;    // [rows, cols] buffer
  int64_t rows, cols;
};

template <class T>
struct TypedKernels {
  void (*fake_quant_weight)(const T* w, T* out, int64_t rows, int64_t cols, int bits, int threads);
  void (*weight_codes)(const T* w, T* codes, T* scale, T* lo_code, int64_t rows, int64_t cols, int bits, int threads);
  void (*fake_quant_act)(const T* x, T lo, T hi, T* out, int64_t n, int bits, int threads);
  void (*min_max)(const T* x, int64_t n, T* lo, T* hi, int threads);
  void (*bn_stats)(const BnStatsArgs<T>&, int threads);
  void (*bn_stats_backward)(const BnStatsBackwardArgs<T>&, int threads);
};

struct Kernels {
  const char* isa;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  void (*gi_sgd)(const GiTensor* tensors, int64_t count, const GiOptions&, float* kappa, int64_t* changed, int threads);
};

template <class T>
const TypedKernels<T>& typed(const Kernels& k);
template <>
inline const TypedKernels<float>& typed(const Kernels& k) {
  return k.f32;
}
template <>
inline const TypedKernels<double>& typed(const Kernels& k) {
  return k.f64;
}

// The table for this machine: AVX-512, AVX2 or portable; ZSQ_CPU_ISA names a lower one. Chosen once.
const Kernels& kernels();

}  // namespace zsq::cpu
