// Built once per instruction set (ZSQ_ISA = portable, avx2, avx512) with -ffp-contract=off: the same sources, the same bits.
// Loops are written over fixed-size lanes so that the compiler vectorises them without reordering any arithmetic.
#include "kernels.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <numeric>
#include <vector>

namespace zsq::cpu::ZSQ_ISA {
namespace {
constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it gives
}
#include "fake_quant.inc"
#include "bn_stats.inc"
#include "gi_sgd.inc"

template <class T> constexpr TypedKernels<T> typed_table() {
  return {fake_quant_weight<T>, weight_codes<T>, fake_quant_act<T>, min_max<T>, bn_stats<T>, bn_stats_backward<T>};
}
#define ZSQ_STRING_(x) #x
#define ZSQ_STRING(x) ZSQ_STRING_(x)
extern const Kernels table;
const Kernels table = {ZSQ_STRING(ZSQ_ISA), typed_table<float>(), typed_table<double>(), gi_sgd};
}  // namespace zsq::cpu::ZSQ_ISA
