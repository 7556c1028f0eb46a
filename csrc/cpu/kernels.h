// CPU kernels on raw pointers, one table per instruction set. No Torch headers.
//
// T is the storage type (float, double, Bf16, Half), Wide<T> the type of parameters, states and results of reductions.
// x [N, C, S] lies as described by its Plane; every other tensor is contiguous. Sums run over a partition that depends
// on the shape alone, never on the number of threads.
#pragma once
#include <cstdint>

#include "../args.h"
#include "../bn_math.h"
#include "../quant_math.h"

namespace zsq::cpu {

template <class T>
struct FakeQuantKernels {
  void (*weight)(const T* w, T* out, int64_t rows, int64_t cols, int bits, int threads);
  void (*weights)(const WeightTensor<T>* tensors, int64_t count, int bits, int threads);
  void (*codes)(const T* w, Wide<T>* codes, Wide<T>* scale, Wide<T>* lo_code, int64_t rows, int64_t cols, int bits,
                int threads);
  void (*act)(const T* x, Wide<T> lo, Wide<T> hi, T* out, int64_t n, int bits, int threads);
  // mask [ceil(n/8)]: bit i%8 of byte i/8 says that x[i] was not clamped (unused bits of the last byte are 0).
  void (*act_clip)(const T* x, Wide<T> lo, Wide<T> hi, T* out, uint8_t* mask, int64_t n, int bits, int threads);
  void (*masked)(const T* grad, const uint8_t* mask, T* out, int64_t n, int threads);
  void (*min_max)(const T* x, int64_t n, Wide<T>* lo, Wide<T>* hi, int threads);
};

template <class T>
struct BnStatsKernels {
  void (*match)(const BnStatsArgs<T>&, int threads);
  void (*match_backward)(const BnStatsBackwardArgs<T>&, int threads);
  void (*eval_sums)(const BnEvalSumsArgs<T>&, int threads);
  void (*eval_sums_backward)(const BnEvalSumsBackwardArgs<T>&, int threads);
};

template <class T>
struct BnActKernels {
  void (*forward)(const BnActArgs<T>&, int threads);
  void (*backward)(const BnActBackwardArgs<T>&, int threads);
};

// Learned step sizes: rows = 1 for a step per tensor.
template <class T>
struct LearnedStepKernels {
  void (*forward)(const T* x, const Wide<T>* step, T* out, int64_t rows, int64_t cols, int code_min, int code_max,
                  int threads);
  void (*backward)(const T* grad, const T* x, const Wide<T>* step, T* grad_x, Wide<T>* grad_step, int64_t rows,
                   int64_t cols, int code_min, int code_max, double grad_factor, int threads);
};

template <class T>
struct LossKernels {
  // student, teacher, grad, grad_teacher: [batch, classes]; teacher, target and grad_teacher may be null; loss, kd,
  // ce: []. Targets must lie in range.
  void (*distillation)(const T* student, const T* teacher, const int64_t* target, const DistillationOptions&,
                       Wide<T>* loss, Wide<T>* kd, Wide<T>* ce, T* grad, T* grad_teacher, int64_t batch,
                       int64_t classes, int threads);
  // student_map, teacher_map: mean squares [N,C] (channel), [N,S] (spatial), unused (direct).
  void (*alignment)(const T* student, const T* teacher, Alignment, Wide<T>* loss, Wide<T>* student_map,
                    Wide<T>* teacher_map, Plane, int threads);
  // grad_student or grad_teacher may be null.
  void (*alignment_backward)(const Wide<T>* grad_loss, const T* student, const T* teacher, const Wide<T>* student_map,
                             const Wide<T>* teacher_map, Alignment, T* grad_student, T* grad_teacher, Plane,
                             int threads);
  void (*perturb)(const T* x, const T* grad, double epsilon, T* out, int64_t n, int threads);
};

struct GiTensor {
  float* weight;      // [rows, cols]
  const float* grad;  // [rows, cols]
  float* momentum;    // [rows, cols] buffer
  int64_t rows, cols;
};

template <class T>
struct TypedKernels {
  FakeQuantKernels<T> fake_quant;
  BnStatsKernels<T> bn_stats;
  BnActKernels<T> bn_act;
  LearnedStepKernels<T> learned_step;
  LossKernels<T> losses;
};

struct Kernels {
  const char* isa;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  TypedKernels<Bf16> bf16;
  TypedKernels<Half> f16;
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
template <>
inline const TypedKernels<Bf16>& typed(const Kernels& k) {
  return k.bf16;
}
template <>
inline const TypedKernels<Half>& typed(const Kernels& k) {
  return k.f16;
}

// The table for this machine: AVX-512, AVX2 or portable; ZSQ_CPU_ISA names a lower one. Chosen once.
const Kernels& kernels();

}  // namespace zsq::cpu
