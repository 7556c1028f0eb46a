// Storage types of 16 bits and the arithmetic type of each storage type, host and device. No Torch, no CUDA headers.
//
// Kernels load a 16-bit value, widen it to float (exact), compute in float, and narrow the result once, half to even.
// The conversions are written with integers and selects so that host compilers vectorise them.
#pragma once
#include <cstring>
#include <type_traits>

#include "quant_math.h"

namespace zsq {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same<T, double>::value, double, float>;

ZSQ_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
ZSQ_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

ZSQ_HD float widen(float x) { return x; }
ZSQ_HD double widen(double x) { return x; }
ZSQ_HD float widen(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
ZSQ_HD float widen(Half x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(mul(float_of(magnitude), 0x1p112f));  // exact, subnormals included
  const uint32_t value = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return float_of(value | uint32_t(x.bits & 0x8000) << 16);
#endif
}

ZSQ_HD void narrow_to(float x, float* out) { *out = x; }
ZSQ_HD void narrow_to(double x, double* out) { *out = x; }
ZSQ_HD void narrow_to(float x, Bf16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  out->bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
ZSQ_HD void narrow_to(float x, Half* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t u = bits_of(x), a = u & 0x7fffffff;
  const uint32_t subnormal = bits_of(add(float_of(a), 0.5f)) - 0x3f000000;  // the addition rounds at 2^-24
  const uint32_t normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;
  h = a > 0x7f800000 ? 0x7e00 : h;
  out->bits = uint16_t(h | (u >> 16 & 0x8000));
#endif
}
template <class T>
ZSQ_HD T narrow(Wide<T> x) {
  T out;
  narrow_to(x, &out);
  return out;
}

}  // namespace zsq
