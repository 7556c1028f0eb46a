// Built once per instruction set (ZSQ_ISA = portable, avx2, avx512) with -ffp-contract=off: the same sources, the same
// bits. Loops are written over fixed-size lanes so that the compiler vectorises them without reordering any arithmetic.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "../loss_math.h"

namespace zsq::cpu::ZSQ_ISA {
namespace {
constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it gives

// f(std::true_type or std::false_type for each condition): a loop per combination, without branches inside.
template <class F>
void choose(F f) {
  f();
}
template <class F, class... Rest>
void choose(F f, bool condition, Rest... rest) {
  condition ? choose([&](auto... later) { f(std::true_type(), later...); }, rest...)
            : choose([&](auto... later) { f(std::false_type(), later...); }, rest...);
}
template <auto kValue>
using constant = std::integral_constant<decltype(kValue), kValue>;

// Work space. Not std::vector: its functions are shared between the objects of all instruction sets, and the linker
// might keep a copy that this processor cannot run.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { grow(n); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  // At least n elements, contents undefined; kept from call to call by thread_local users, since fresh memory in every
  // step would cost more in page faults than the arithmetic.
  T* grow(int64_t n) {
    if (n > size_) {
      shrink(0);
      data_ = static_cast<T*>(std::malloc(size_t(n) * sizeof(T)));
      if (!data_) throw std::bad_alloc();
      size_ = n;
    }
    return data_;
  }
  // Gives the memory back if it is more than that.
  void shrink(int64_t n) {
    if (size_ <= n) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};
}  // namespace
#include "streaming.inc"

#include "bn_act.inc"
#include "bn_stats.inc"
#include "fake_quant.inc"
#include "gi_sgd.inc"
#include "learned_step.inc"
#include "losses.inc"

template <class T>
constexpr TypedKernels<T> typed_table() {
  return {fake_quant_table<T>(), bn_stats_table<T>(), bn_act_table<T>(), learned_step_table<T>(), loss_table<T>()};
}
#define ZSQ_STRING_(x) #x
#define ZSQ_STRING(x) ZSQ_STRING_(x)
extern const Kernels table;
const Kernels table = {ZSQ_STRING(ZSQ_ISA), typed_table<float>(), typed_table<double>(),
                       typed_table<Bf16>(), typed_table<Half>(),  gi_sgd};
}  // namespace zsq::cpu::ZSQ_ISA
