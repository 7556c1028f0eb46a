// What kernels with many arguments take, the same for CPU and CUDA.
//
// T is the storage type (float, double, Bf16, Half), Wide<T> the type of parameters, states and results of reductions.
// x [N, C, S] lies as described by its Plane, as do tensors of its shape; every other tensor is contiguous.
#pragma once
#include "number.h"

namespace zsq {

// x [N, C, S] with the channel's stride either S (NCHW) or 1 (channels_last, S being the product of spatial sizes).
struct Plane {
  int64_t n, c, s;
  bool channels_last;
};

// A weight of the network: [rows, cols].
template <class T>
struct WeightTensor {
  const T* weight;
  T* out;
  int64_t rows, cols;
};

template <class T>
struct BnStatsArgs {
  const T* x;                             // [N,C,S]
  const Wide<T>*mean, *var;               // [C]: running statistics to match
  Wide<T>*loss, *batch_mean, *batch_var;  // [], [C], [C]
  Plane shape;
};

template <class T>
struct BnStatsBackwardArgs {
  const Wide<T>* grad_loss;                           // []
  const T* x;                                         // [N,C,S]
  const Wide<T>*mean, *var, *batch_mean, *batch_var;  // [C]
  T* grad_x;                                          // [N,C,S], layout of x
  Plane shape;
};

// y = x*scale + shift and the sums of (x - mean) and (x - mean)^2 per channel, from one read of x.
template <class T>
struct BnEvalSumsArgs {
  const T* x;                                // [N,C,S]
  const Wide<T>*mean, *var, *weight, *bias;  // [C]; weight and bias may be null
  double eps;
  T* y;          // [N,C,S], layout of x
  double* sums;  // [2, C]
  Plane shape;
};

// grad_x = grad_y*scale + grad_sums[0] + 2*grad_sums[1]*(x - mean)
template <class T>
struct BnEvalSumsBackwardArgs {
  const T* grad_y;          // [N,C,S]; null counts as zero
  const double* grad_sums;  // [2, C]
  const T* x;
  const Wide<T>*mean, *var, *weight;
  double eps;
  T* grad_x;
  Plane shape;
};

enum class Activation : int { kNone, kRelu, kRelu6 };

// out = fake_quant(activation(x*scale + shift + residual)); mask as in fake_quant_act_clip, in memory order of
// x.
template <class T>
struct BnActArgs {
  const T *x, *residual;                     // [N,C,S], same layout; residual may be null
  const Wide<T>*mean, *var, *weight, *bias;  // [C]; weight and bias may be null
  double eps;
  Activation activation;
  const Wide<T>*lo, *hi;  // [1]
  int bits;
  bool clip;      // the mask also blocks values clamped to the code range
  T* out;         // [N,C,S]
  uint8_t* mask;  // may be null: nobody wants a gradient
  Plane shape;
};

template <class T>
struct BnActBackwardArgs {
  const T* grad;  // [N,C,S]
  const uint8_t* mask;
  const T* x;  // needed for grad_weight only
  const Wide<T>*mean, *var, *weight;
  double eps;
  T *grad_x, *grad_residual;        // grad_residual = masked grad; may be null
  Wide<T>*grad_weight, *grad_bias;  // [C]; may both be null
  Plane shape;
};

struct DistillationOptions {
  double temperature, kd_weight, ce_weight, gamma;
  bool batchmean;
};
enum class Alignment : int { kChannel, kSpatial, kDirect };

}  // namespace zsq
