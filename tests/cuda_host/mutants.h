// Switches for mutants.py: in a planted copy of the kernel sources every synchronisation carries a numbered Site, and
// the environment variable ZSQ_MUTANT turns one of them off. One build thus holds all mutants.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "host_exec.h"

namespace hexec {
struct Site {
  int id;
};
// Counts without TSan looking; the count tells a case that never comes by from one that notices nothing.
struct Active {
  int id = std::getenv("ZSQ_MUTANT") ? std::atoi(std::getenv("ZSQ_MUTANT")) : 0;
  unsigned long long reached = 0;
  ~Active() {
    if (id) std::printf("mutant %d was reached %llu times\n", id, reached);
  }
};
inline Active active;
__attribute__((no_sanitize_thread, noinline)) inline bool off(Site s) { return s.id == active.id && ++active.reached; }
// What arrive_last says; its mutant lets every block finish.
inline bool last_or_every(Site s, bool last) { return off(s) || last; }
template <class Group>
void sync(Site s, const Group& group, HX_HERE) {
  if (!off(s)) group.sync(file, line);
}
}  // namespace hexec

inline void __syncthreads(hexec::Site s, HX_HERE) {
  if (!hexec::off(s)) __syncthreads(file, line);
}
inline int __syncthreads_count(hexec::Site s, int p, HX_HERE) {
  return hexec::off(s) ? p != 0 : __syncthreads_count(p, file, line);
}
inline int __syncthreads_and(hexec::Site s, int p, HX_HERE) {
  return hexec::off(s) ? p : __syncthreads_and(p, file, line);
}
inline int __syncthreads_or(hexec::Site s, int p, HX_HERE) {
  return hexec::off(s) ? p : __syncthreads_or(p, file, line);
}
inline void __syncwarp(hexec::Site s, unsigned m = ~0u, HX_HERE) {
  if (!hexec::off(s)) __syncwarp(m, file, line);
}
inline void __threadfence(hexec::Site s) {
  if (!hexec::off(s)) __threadfence();
}
inline void __threadfence_block(hexec::Site s) {
  if (!hexec::off(s)) __threadfence_block();
}
#define HX_ATOMIC(NAME)                           \
  template <class T, class... A>                  \
  T NAME(hexec::Site s, T* p, A... a) {           \
    if (hexec::off(s)) hexec::tear_next_atomic(); \
    return NAME(p, a...);                         \
  }
HX_ATOMIC(atomicAdd)
HX_ATOMIC(atomicSub)
HX_ATOMIC(atomicMax)
HX_ATOMIC(atomicMin)
HX_ATOMIC(atomicOr)
HX_ATOMIC(atomicAnd)
HX_ATOMIC(atomicExch)
HX_ATOMIC(atomicCAS)
HX_ATOMIC(atomicInc)
