// host_exec.h - run CUDA kernel sources on the CPU with g++/clang++ (tests only).
//
// Part 1 is included through csrc/cuda/launch.h in place of the CUDA runtime.
// Part 2 (HEXEC_IMPLEMENTATION, one file, built WITHOUT sanitizer flags) is the scheduler:
// every CUDA thread is a fiber with its own stack; all of them share one OS thread, and the
// scheduler picks the next one by a seeded order at each barrier, warp operation and atomic.
#pragma once
#ifdef __CUDACC__
#error "host_exec.h is for host compilers only"
#endif
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "declare shared memory with ZSQ_SHARED / ZSQ_DYN_SHARED")
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define HX_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace hexec {
// Constant for one CUDA thread, so the compiler may reuse the value inside a kernel.
__attribute__((const)) uint3 thread_idx();
__attribute__((const)) uint3 block_idx();
__attribute__((const)) dim3 block_dim();
__attribute__((const)) dim3 grid_dim();
__attribute__((const)) unsigned lane();
enum Op { SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, RED_ADD, RED_MIN, RED_MAX, SYNCWARP };
uint64_t warp(Op op, unsigned mask, uint64_t v, int arg, int width, const char* file, int line);
enum Vote { V_NONE, V_COUNT, V_AND, V_OR };
int block_sync(Vote v, int pred, const char* file, int line);
void grid_sync(const char* file, int line);
void fence();               // __threadfence
bool atomic_pre(void* p);   // a possible switch point, then: fence, atomic p -> atomic p, fence
void atomic_post(void* p);  // is the only order that atomics give
void tear_next_atomic();    // of this thread: a plain read-modify-write (mutants.h); atomic_pre then says false
void* shared_var(const void* key, size_t bytes, const char* name);
void* dyn_shared(size_t align);
struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  bool coop = false;
};
void run(const Launch&, void (*body)(void*), void* arg);  // throws std::runtime_error
struct Options {
  uint64_t seed = 1;      // 0: thread order; odd: uniform random; even: random warp priorities
  unsigned resident = 3;  // blocks in flight at a time (a cooperative launch: all of them)
  unsigned max_coop_blocks = 64;
  size_t stack = 128 << 10;
};
Options& options();
inline unsigned long long& launches() {
  static unsigned long long n;
  return n;
}

template <class T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
T unpack(uint64_t u) {
  T v;
  memcpy(&v, &u, sizeof v);
  return v;
}
template <class T, class F>
T rmw(T* p, F f) {  // atomic read-modify-write, relaxed as on the GPU
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(U));
  if (!atomic_pre(p)) {
    const T old = *p;
    *p = f(old);
    return old;
  }
  U* q = reinterpret_cast<U*>(p);
  U old = __atomic_load_n(q, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(q, &old, (U)pack<T>(f(unpack<T>(old))), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {}
  atomic_post(p);
  return unpack<T>(old);
}
template <class T>
struct Id {
  using type = T;
};
}  // namespace hexec
#define threadIdx (::hexec::thread_idx())
#define blockIdx (::hexec::block_idx())
#define blockDim (::hexec::block_dim())
#define gridDim (::hexec::grid_dim())
constexpr int warpSize = 32;
// Each declaration is a heap block of its own per CUDA block: exact ASan redzones on both ends,
// poisoned contents, and gone when the block ends. The key is per template instantiation.
#define ZSQ_SHARED(T, name, ...)                                       \
  static const char name##_key_ = 0;                                   \
  auto& name = *static_cast<typename hexec::Id<T __VA_ARGS__>::type*>( \
      ::hexec::shared_var(&name##_key_, sizeof(T __VA_ARGS__), #name))
#define ZSQ_DYN_SHARED(T, name) T* name = static_cast<T*>(::hexec::dyn_shared(alignof(T)))

// ---- synchronisation, warp operations --------------------------------------------------------
inline void __syncthreads(HX_HERE) { hexec::block_sync(hexec::V_NONE, 0, file, line); }
inline int __syncthreads_count(int p, HX_HERE) { return hexec::block_sync(hexec::V_COUNT, p, file, line); }
inline int __syncthreads_and(int p, HX_HERE) { return hexec::block_sync(hexec::V_AND, p, file, line); }
inline int __syncthreads_or(int p, HX_HERE) { return hexec::block_sync(hexec::V_OR, p, file, line); }
inline void __syncwarp(unsigned m = ~0u, HX_HERE) { hexec::warp(hexec::SYNCWARP, m, 0, 0, 32, file, line); }
#define HX_SHFL(NAME, OP, ARG)                                                                     \
  template <class T>                                                                               \
  T NAME(unsigned m, T v, ARG a, int width = 32, HX_HERE) {                                        \
    return hexec::unpack<T>(hexec::warp(hexec::OP, m, hexec::pack(v), (int)a, width, file, line)); \
  }
HX_SHFL(__shfl_sync, SHFL, int)
HX_SHFL(__shfl_up_sync, SHFL_UP, unsigned)
HX_SHFL(__shfl_down_sync, SHFL_DOWN, unsigned)
HX_SHFL(__shfl_xor_sync, SHFL_XOR, int)
inline unsigned __ballot_sync(unsigned m, int p, HX_HERE) {
  return (unsigned)hexec::warp(hexec::BALLOT, m, p != 0, 0, 32, file, line);
}
inline int __any_sync(unsigned m, int p, HX_HERE) { return (int)hexec::warp(hexec::ANY, m, p != 0, 0, 32, file, line); }
inline int __all_sync(unsigned m, int p, HX_HERE) { return (int)hexec::warp(hexec::ALL, m, p != 0, 0, 32, file, line); }
template <class T>
T __reduce_add_sync(unsigned m, T v, HX_HERE) {
  return (T)hexec::warp(hexec::RED_ADD, m, (uint64_t)(int64_t)v, 0, 32, file, line);
}
template <class T>
T __reduce_min_sync(unsigned m, T v, HX_HERE) {
  return (T)hexec::warp(hexec::RED_MIN, m, (uint64_t)(int64_t)v, 0, 32, file, line);
}
template <class T>
T __reduce_max_sync(unsigned m, T v, HX_HERE) {
  return (T)hexec::warp(hexec::RED_MAX, m, (uint64_t)(int64_t)v, 0, 32, file, line);
}
inline void __threadfence() { hexec::fence(); }
inline void __threadfence_block() { hexec::fence(); }

template <class T>
T atomicAdd(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return T(o + v); });
}
template <class T>
T atomicSub(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return T(o - v); });
}
template <class T>
T atomicMax(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return o < v ? v : o; });
}
template <class T>
T atomicMin(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return v < o ? v : o; });
}
template <class T>
T atomicOr(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return T(o | v); });
}
template <class T>
T atomicAnd(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return T(o & v); });
}
template <class T>
T atomicExch(T* p, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, typename hexec::Id<T>::type c, typename hexec::Id<T>::type v) {
  return hexec::rmw(p, [=](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned* p, unsigned lim) {
  return hexec::rmw(p, [=](unsigned o) { return o >= lim ? 0u : o + 1; });
}

// ---- loads/stores with cache hints, arithmetic ----------------------------------------------
#define HX_LOAD(N)   \
  template <class T> \
  T N(const T* p) {  \
    return *p;       \
  }
#define HX_STORE(N)                             \
  template <class T>                            \
  void N(T* p, typename hexec::Id<T>::type v) { \
    *p = v;                                     \
  }
// clang-format off
HX_LOAD(__ldg) HX_LOAD(__ldcs) HX_LOAD(__ldcg) HX_LOAD(__ldca) HX_LOAD(__ldlu)
HX_STORE(__stcs) HX_STORE(__stcg) HX_STORE(__stwb) HX_STORE(__stwt)
// build with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
// clang-format on
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1.f / std::sqrt(a); }
inline int hx_f2i(float r) { return r != r ? 0 : r >= 2147483648.f ? INT_MAX : r <= -2147483648.f ? INT_MIN : (int)r; }
inline int __float2int_rn(float a) { return hx_f2i(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return hx_f2i(std::trunc(a)); }
inline int __float2int_rd(float a) { return hx_f2i(std::floor(a)); }
inline float __int2float_rn(int a) { return (float)a; }
inline int __float_as_int(float a) { return hexec::unpack<int>(hexec::pack(a)); }
inline unsigned __float_as_uint(float a) { return hexec::unpack<unsigned>(hexec::pack(a)); }
inline float __int_as_float(int a) { return hexec::unpack<float>(hexec::pack(a)); }
inline float __uint_as_float(unsigned a) { return hexec::unpack<float>(hexec::pack(a)); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace cooperative_groups {
struct thread_block {
  void sync(HX_HERE) const { hexec::block_sync(hexec::V_NONE, 0, file, line); }
  unsigned thread_rank() const { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
};
struct grid_group {
  void sync(HX_HERE) const { hexec::grid_sync(file, line); }
  unsigned block_rank() const { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
  unsigned num_blocks() const { return gridDim.x * gridDim.y * gridDim.z; }
  unsigned long long thread_rank() const {
    return (unsigned long long)block_rank() * thread_block{}.size() + thread_block{}.thread_rank();
  }
  unsigned long long size() const { return (unsigned long long)num_blocks() * thread_block{}.size(); }
  bool is_valid() const { return true; }
};
template <unsigned N>
struct thread_block_tile {
  static_assert(N <= 32 && (N & (N - 1)) == 0);
  unsigned mask() const { return (N == 32 ? ~0u : (1u << (N & 31)) - 1) << (hexec::lane() & ~(N - 1)); }
  unsigned thread_rank() const { return hexec::lane() & (N - 1); }
  static constexpr unsigned size() { return N; }
  unsigned meta_group_rank() const { return thread_block{}.thread_rank() / N; }
  unsigned meta_group_size() const { return (thread_block{}.size() + N - 1) / N; }
  void sync(HX_HERE) const { __syncwarp(mask(), file, line); }
  template <class T>
  T shfl(T v, int s, HX_HERE) const {
    return __shfl_sync(mask(), v, s, N, file, line);
  }
  template <class T>
  T shfl_up(T v, unsigned d, HX_HERE) const {
    return __shfl_up_sync(mask(), v, d, N, file, line);
  }
  template <class T>
  T shfl_down(T v, unsigned d, HX_HERE) const {
    return __shfl_down_sync(mask(), v, d, N, file, line);
  }
  template <class T>
  T shfl_xor(T v, int x, HX_HERE) const {
    return __shfl_xor_sync(mask(), v, x, N, file, line);
  }
  unsigned ballot(int p, HX_HERE) const {
    return (__ballot_sync(mask(), p, file, line) & mask()) >> (hexec::lane() & ~(N - 1));
  }
  int any(int p, HX_HERE) const { return __any_sync(mask(), p, file, line); }
  int all(int p, HX_HERE) const { return __all_sync(mask(), p, file, line); }
};
inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }
template <unsigned N>
thread_block_tile<N> tiled_partition(const thread_block&) {
  return {};
}
}  // namespace cooperative_groups

#ifdef HEXEC_IMPLEMENTATION
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <sys/mman.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__) || defined(HEXEC_UCONTEXT)
#define HX_UCONTEXT 1
#include <ucontext.h>
#endif
#define HX_WEAK extern "C" __attribute__((weak))  // present only in a sanitized program
HX_WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
HX_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
HX_WEAK void __asan_unpoison_memory_region(void const volatile*, size_t);
HX_WEAK void* __tsan_get_current_fiber(void);
HX_WEAK void* __tsan_create_fiber(unsigned);
HX_WEAK void __tsan_destroy_fiber(void*);
HX_WEAK void __tsan_switch_to_fiber(void*, unsigned);
HX_WEAK void __tsan_set_fiber_name(void*, const char*);
HX_WEAK void __tsan_acquire(void*);
HX_WEAK void __tsan_release(void*);
HX_WEAK void AnnotateIgnoreReadsBegin(const char*, int);
HX_WEAK void AnnotateIgnoreReadsEnd(const char*, int);
HX_WEAK void AnnotateIgnoreWritesBegin(const char*, int);
HX_WEAK void AnnotateIgnoreWritesEnd(const char*, int);
#ifndef HX_UCONTEXT
extern "C" void hexec_switch(void** save, void* load);
asm(".text\n.globl hexec_switch\n.hidden hexec_switch\n.type hexec_switch,@function\nhexec_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size hexec_switch,.-hexec_switch\n");
#endif
namespace hexec {
namespace {
struct Fiber {
  void *sp = nullptr, *fake = nullptr, *tsan = nullptr;
  char* stack = nullptr;
  int quiet = 0;
  size_t size = 0;
#ifdef HX_UCONTEXT
  ucontext_t uc;
#endif
};
struct Block;
struct Coll {  // a warp operation in progress
  Op op;
  unsigned mask, in = 0, out = 0;
  bool done = false;
  const char* file;
  int line;
  uint64_t v[32];
};
struct Thread {
  uint3 id;
  unsigned lin;
  Block* b;
  Fiber* f = nullptr;
  const char* wait = nullptr;
  const char* file = "";
  int line = 0;
  bool done = false, fenced = false, tear = false;
  std::vector<void*> seen;
};
struct Barrier {
  std::vector<Thread*> w;
  const char* file = "";
  int line = 0;
  int cnt = 0, all = 1, any = 0, gen_cnt = 0, gen_all = 0, gen_any = 0;
  unsigned phase = 0;
  char tag[2];
  Vote v = V_NONE;
};
struct Warp {
  unsigned alive = 0;
  uint64_t prio = 0;
  std::vector<Coll*> open;
};
struct Block {
  uint3 id;
  std::vector<Thread> t;
  std::vector<Warp> w;
  Barrier bar;
  unsigned live = 0;
  std::map<const void*, std::pair<void*, size_t>> sh;
  void* dyn = nullptr;
};
struct Engine {
  Launch L;
  void (*body)(void*);
  void* arg;
  Options o;
  uint64_t rng;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Thread*> ready;
  Barrier grid;
  Fiber main;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  Thread *cur = nullptr, *next = nullptr;
  std::string err;
  unsigned live = 0;
  char start_tag, end_tag;
  std::vector<Fiber*> spare, used;
  std::deque<Coll> colls;
  std::vector<Coll*> free_colls;
};
thread_local Engine* g;
struct Pool : std::vector<Fiber*> {  // stacks kept between launches; main orders a reuse after the last use
  ~Pool() {
    for (Fiber* f : *this) {
      if (f->tsan) __tsan_destroy_fiber(f->tsan);
      munmap(f->stack - 4096, f->size + 4096);
      delete f;
    }
  }
};
thread_local Pool pool;

thread_local int quiet_depth;
void hush(int n) {
  for (; n > 0 && AnnotateIgnoreReadsBegin; n--) {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  for (; n < 0 && AnnotateIgnoreReadsBegin; n++) {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
}
struct Quiet {  // the executor's own memory use is no business of TSan's
  Quiet() {
    hush(1);
    quiet_depth++;
  }
  ~Quiet() {
    hush(-1);
    quiet_depth--;
  }
};
uint64_t rnd() {
  uint64_t& x = g->rng;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x * 0x2545F4914F6CDD1Dull >> 16;
}
void acq(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
void rel(void* p) {
  if (__tsan_release) __tsan_release(p);
}
Thread* pick() {
  auto& r = g->ready;
  if (r.empty()) return nullptr;
  size_t n = r.size(), i = 0;
  if (g->o.seed & 1)
    i = rnd() % n;
  else if (g->o.seed) {
    i = rnd() % n;
    for (int k = 0; k < 8; k++) {
      size_t j = rnd() % n;
      if (r[j]->b->w[r[j]->lin / 32].prio > r[i]->b->w[r[i]->lin / 32].prio) i = j;
    }
  }
  Thread* t = r[i];
  if (i == 0)
    r.pop_front();
  else {
    r[i] = r.back();
    r.pop_back();
  }
  return t;
}
void hop(Fiber* from, Fiber* to, bool to_main) {
  void* fake = nullptr;
  from->quiet = quiet_depth;
  quiet_depth = to->quiet;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&fake, to_main ? g->main_bottom : to->stack, to_main ? g->main_size : to->size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to->tsan, 1 /* no_sync */);
#ifdef HX_UCONTEXT
  swapcontext(&from->uc, &to->uc);
#else
  hexec_switch(&from->sp, to->sp);
#endif
  const void* b;
  size_t s;
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake, &b, &s);
}
void to_main() { hop(g->cur->f, &g->main, true); }
struct Stop {};  // unwinds the failing fiber; the others are dropped where they stand
[[noreturn]] void die(std::string m) {
  if (g->err.empty()) g->err = std::move(m);
  throw Stop{};
}
std::string at(const Thread* t) {
  char s[160];
  snprintf(s, sizeof s, "block (%u,%u,%u) thread (%u,%u,%u)", t->b->id.x, t->b->id.y, t->b->id.z, t->id.x, t->id.y,
           t->id.z);
  return s;
}
std::string where(const char* f, int l) {
  const char* s = strrchr(f, '/');
  return std::string(s ? s + 1 : f) + ":" + std::to_string(l);
}
void block_on(const char* what, const char* f, int l) {
  Thread* t = g->cur;
  t->wait = what;
  t->file = f;
  t->line = l;
  to_main();
  t->wait = nullptr;
}
void wake(Thread* t) { g->ready.push_back(t); }
bool covers(Block* b, Thread* t, Coll* c) {  // all live lanes named in the mask have arrived?
  unsigned need = c->mask & b->w[t->lin / 32].alive;
  if ((c->in & need) != need) return false;
  c->done = true;
  auto& o = b->w[t->lin / 32].open;
  o.erase(std::find(o.begin(), o.end(), c));
  for (unsigned i = 0, base = t->lin & ~31u; i < 32 && base + i < b->t.size(); i++)
    if ((c->in >> i & 1) && base + i != t->lin) wake(&b->t[base + i]);
  return true;
}
void on_exit(Thread* t) {
  Block* b = t->b;
  Warp& w = b->w[t->lin / 32];
  t->done = true;
  b->live--;
  g->live--;
  w.alive &= ~(1u << (t->lin & 31));
  rel(&g->end_tag);
  if (!b->bar.w.empty())
    die("divergent barrier: " + at(t) + " returned while " + std::to_string(b->bar.w.size()) +
        " threads of its block wait at __syncthreads " + where(b->bar.file, b->bar.line));
  if (!g->grid.w.empty())
    die("divergent grid barrier: " + at(t) + " returned while others wait at grid.sync " +
        where(g->grid.file, g->grid.line));
  const auto open = w.open;
  for (Coll* c : open) covers(b, t, c);
}
void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    size_t s;
    const void* b;
    __sanitizer_finish_switch_fiber(nullptr, &b, &s);
    if (!g->main_bottom) {
      g->main_bottom = b;
      g->main_size = s;
    }
  }
  for (;;) {
    Thread* t = g->cur;
    Fiber* f = t->f;
    acq(&g->start_tag);
    try {
      g->body(g->arg);
      Quiet q;
      on_exit(t);
      Thread* n = __tsan_switch_to_fiber ? nullptr : pick();  // run the next fresh thread on this stack: no switch
      if (n && !n->f) {
        n->f = f;
        t->f = nullptr;
        g->cur = n;
        continue;
      }
      g->next = n;
      g->spare.push_back(f);
    } catch (const Stop&) {}
    to_main();
  }
}
Fiber* get_fiber(Thread* t) {
  Fiber* f;
  if (!g->spare.empty() && !__tsan_switch_to_fiber) {
    f = g->spare.back();
    g->spare.pop_back();
    return f;
  }
  if (!pool.empty()) {
    f = pool.back();
    pool.pop_back();
  } else {
    f = new Fiber;
    f->size = g->o.stack;
    char* m = (char*)mmap(nullptr, f->size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                          -1, 0);
    if (m == MAP_FAILED) throw std::runtime_error("hexec: out of stacks");
    mprotect(m, 4096, PROT_NONE);
    f->stack = m + 4096;
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(f->stack, f->size);
#ifdef HX_UCONTEXT
  getcontext(&f->uc);
  f->uc.uc_stack = {};
  f->uc.uc_stack.ss_sp = f->stack;
  f->uc.uc_stack.ss_size = f->size;
  f->uc.uc_link = nullptr;
  makecontext(&f->uc, fiber_main, 0);
#else
  void** top = (void**)(f->stack + f->size);
  memset(top - 8, 0, 64);
  top[-2] = (void*)fiber_main;
  f->sp = top - 8;
#endif
  if (__tsan_create_fiber) {
    if (!f->tsan) f->tsan = __tsan_create_fiber(0);
    __tsan_set_fiber_name(f->tsan, at(t).c_str());
  }
  g->used.push_back(f);
  return f;
}
void free_fibers() {
  for (Fiber* f : g->used) {
    if (f->tsan && !g->err.empty()) {  // abandoned half-way
      __tsan_switch_to_fiber(f->tsan, 1);
      hush(-f->quiet);
      __tsan_switch_to_fiber(g->main.tsan, 1);
      __tsan_destroy_fiber(f->tsan);
      f->tsan = nullptr;
    }
    f->quiet = 0;
    pool.push_back(f);
  }
  g->used.clear();
  g->spare.clear();
}
template <class F>
void in_main(F f) {  // do host-side work as the launching thread, in TSan's eyes
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(g->main.tsan, 1);
  f();
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(g->cur->f->tsan, 1);
}
void* fresh(size_t bytes) {  // poisoned: NaN / -1, or random bytes
  char* p = (char*)malloc(bytes ? bytes : 1);
  if (g->rng & 64)
    memset(p, 0xff, bytes);
  else
    for (size_t i = 0; i < bytes; i++) p[i] = (char)rnd();
  return p;
}
int sync(Barrier& B, size_t need, size_t total, Vote v, int pred, const char* f, int l, const char* what) {
  Quiet q;
  Thread* t = g->cur;
  if (B.w.empty()) {
    B.file = f;
    B.line = l;
    B.cnt = B.any = 0;
    B.all = 1;
    B.v = v;
  } else if (B.line != l || strcmp(B.file, f) || B.v != v)
    die(std::string("divergent barrier: ") + at(t) + " is at " + what + " " + where(f, l) + " but " + at(B.w[0]) +
        " waits at " + where(B.file, B.line));
  B.cnt += pred != 0;
  B.all &= pred != 0;
  B.any |= pred != 0;
  char* tag = &B.tag[B.phase & 1];  // two tags: a fast thread's next arrival must not order a slow one
  rel(tag);
  if (need != total)
    die(std::string("divergent barrier: ") + at(t) + " reached " + what + " " + where(f, l) + " after " +
        std::to_string(total - need) + " threads had returned");
  B.w.push_back(t);
  if (B.w.size() == need) {
    B.gen_cnt = B.cnt;
    B.gen_all = B.all;
    B.gen_any = B.any;
    for (Thread* o : B.w) wake(o);  // itself too: the scheduler decides who goes first
    B.w.clear();
    B.phase++;
  }
  block_on(what, f, l);
  acq(tag);
  return v == V_COUNT ? B.gen_cnt : v == V_AND ? B.gen_all : B.gen_any;
}
}  // namespace

uint3 thread_idx() { return g->cur->id; }
uint3 block_idx() { return g->cur->b->id; }
dim3 block_dim() { return g->L.block; }
dim3 grid_dim() { return g->L.grid; }
unsigned lane() { return g->cur->lin & 31; }
Options& options() {
  static Options o;
  return o;
}
void maybe_switch() {
  if ((g->o.seed && (rnd() & 3)) || g->ready.empty()) return;
  wake(g->cur);
  to_main();
}
void tear_next_atomic() { g->cur->tear = true; }
bool atomic_pre(void* p) {
  Quiet q;
  maybe_switch();
  if (std::exchange(g->cur->tear, false)) return false;
  if (g->cur->fenced) rel(p);
  return true;
}
void atomic_post(void* p) {
  if (!__tsan_acquire) return;
  Quiet q;
  auto& v = g->cur->seen;
  if (std::find(v.begin(), v.end(), p) == v.end()) v.push_back(p);
}
void fence() {
  Quiet q;
  Thread* t = g->cur;
  for (void* p : t->seen) acq(p);
  t->seen.clear();
  t->fenced = true;
  maybe_switch();
}
int block_sync(Vote v, int pred, const char* f, int l) {
  Block* b = g->cur->b;
  return sync(b->bar, b->live, b->t.size(), v, pred, f, l, "__syncthreads");
}
void grid_sync(const char* f, int l) {
  if (!g->L.coop) die("grid.sync " + where(f, l) + " in a launch that is not cooperative");
  sync(g->grid, g->live, g->blocks.size() * g->blocks[0]->t.size(), V_NONE, 0, f, l, "grid.sync");
}
void* shared_var(const void* key, size_t bytes, const char*) {
  Quiet q;
  auto& s = g->cur->b->sh[key];
  if (!s.first)
    in_main([&] {
      s = {fresh(bytes), bytes};
      rel(s.first);
    });
  acq(s.first);
  return s.first;
}
void* dyn_shared(size_t) {
  Quiet q;
  Block* b = g->cur->b;
  if (!b->dyn)
    in_main([&] {
      b->dyn = fresh(g->L.smem);
      rel(b->dyn);
    });
  acq(b->dyn);
  return b->dyn;
}
uint64_t warp(Op op, unsigned mask, uint64_t v, int arg, int width, const char* f, int l) {
  static const char* const names[] = {"__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync", "__shfl_xor_sync",
                                      "__ballot_sync",     "__any_sync",        "__all_sync",       "__reduce_add_sync",
                                      "__reduce_min_sync", "__reduce_max_sync", "__syncwarp"};
  Quiet q;
  Thread* t = g->cur;
  Warp& w = t->b->w[t->lin / 32];
  unsigned me = t->lin & 31;
  auto say = [&](const std::string& m) {
    die(std::string(names[op]) + " " + where(f, l) + " " + at(t) + " lane " + std::to_string(me) + ": " + m);
  };
  auto hex = [](unsigned m) {
    char s[16];
    snprintf(s, 16, "0x%08x", m);
    return std::string(s);
  };
  if (!(mask >> me & 1)) say("the calling lane is not in the mask " + hex(mask));
  Coll* c = nullptr;
  for (Coll* o : w.open) {
    if (!(o->mask & mask)) continue;
    if (o->mask != mask || o->op != op || o->line != l || strcmp(o->file, f))
      say("mask " + hex(mask) + " meets " + names[o->op] + " " + where(o->file, o->line) + " with mask " +
          hex(o->mask) + " (divergent warp operation)");
    c = o;
  }
  if (!c) {
    if (g->free_colls.empty()) {
      g->colls.emplace_back();
      c = &g->colls.back();
    } else {
      c = g->free_colls.back();
      g->free_colls.pop_back();
    }
    c->op = op;
    c->mask = mask;
    c->in = c->out = 0;
    c->done = false;
    c->file = f;
    c->line = l;
    w.open.push_back(c);
  }
  c->in |= 1u << me;
  c->v[me] = v;
  if (op == SYNCWARP) rel(&w);
  if (!covers(t->b, t, c)) block_on(names[op], f, l);
  if (op == SYNCWARP) acq(&w);
  uint64_t r = 0;
  int base = (int)me & ~(width - 1), src = (int)me, rel_lane = (int)me - base;
  bool first = true;
  switch (op) {
    case SHFL:
      src = base + (arg & (width - 1));
      break;
    case SHFL_UP:
      src = rel_lane - arg < 0 ? (int)me : (int)me - arg;
      break;
    case SHFL_DOWN:
      src = rel_lane + arg >= width ? (int)me : (int)me + arg;
      break;
    case SHFL_XOR:
      src = ((int)me ^ arg) >= base + width ? (int)me : (int)me ^ arg;
      break;
    default:
      for (int i = 0; i < 32; i++) {
        if (!(c->in >> i & 1)) continue;
        int64_t x = (int64_t)c->v[i], y = (int64_t)r;
        if (op == BALLOT)
          r |= (uint64_t)(x != 0) << i;
        else if (op == RED_ADD)
          r = (uint64_t)(y + x);
        else
          r = first       ? (uint64_t)x
              : op == ANY ? (uint64_t)(y | x)
              : op == ALL ? (uint64_t)(y & x)
                          : (uint64_t)(op == RED_MIN ? std::min(x, y) : std::max(x, y));
        first = false;
      }
  }
  if (op <= SHFL_XOR) {
    if (!(c->in >> src & 1))
      say("reads lane " + std::to_string(src) + ", which is not taking part (mask " + hex(mask) + ", present " +
          hex(c->in) + ")");
    r = c->v[src];
  }
  c->out |= 1u << me;
  if (c->out == c->in) g->free_colls.push_back(c);
  return r;
}
void run(const Launch& L, void (*body)(void*), void* arg) {
  if (g) throw std::runtime_error("hexec: nested launch");
  Quiet quiet;
  launches()++;
  Engine e;
  e.L = L;
  e.body = body;
  e.arg = arg;
  e.o = options();
  e.rng = (e.o.seed + 1) * 0x9E3779B97F4A7C15ull;
  const unsigned nt = L.block.x * L.block.y * L.block.z;
  const size_t nb = (size_t)L.grid.x * L.grid.y * L.grid.z;
  if (!nt || nt > 1024 || !nb || L.grid.y > 65535 || L.grid.z > 65535 || L.grid.x > 0x7fffffffu ||
      L.smem > (227u << 10))
    throw std::runtime_error("hexec: invalid launch configuration");
  if (L.coop && nb > e.o.max_coop_blocks) throw std::runtime_error("hexec: cooperative launch too large");
  g = &e;
  if (__tsan_get_current_fiber) e.main.tsan = __tsan_get_current_fiber();
  std::vector<size_t> order(nb);
  for (size_t i = 0; i < nb; i++) order[i] = i;
  if (e.o.seed)
    for (size_t i = nb; i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
  size_t wave = L.coop ? nb : std::max<size_t>(1, e.o.resident),
         most = __tsan_create_fiber ? std::max(1u, 6000 / nt) : nb;  // libtsan: 8128 threads
  if (!L.coop)
    wave = std::min(wave, most);
  else if (nb > most) {
    g = nullptr;
    throw std::runtime_error("hexec: cooperative launch too large for TSan");
  }
  for (size_t at0 = 0; at0 < nb && e.err.empty(); at0 += wave) {
    for (size_t i = at0; i < std::min(nb, at0 + wave); i++) {
      auto b = std::make_unique<Block>();
      size_t k = order[i];
      b->id = make_uint3(k % L.grid.x, k / L.grid.x % L.grid.y, k / L.grid.x / L.grid.y);
      b->t.resize(nt);
      b->w.resize((nt + 31) / 32);
      b->live = nt;
      e.live += nt;
      for (auto& w : b->w) w.prio = rnd();
      for (unsigned j = 0; j < nt; j++) {
        b->t[j].id = make_uint3(j % L.block.x, j / L.block.x % L.block.y, j / L.block.x / L.block.y);
        b->t[j].lin = j;
        b->t[j].b = b.get();
        b->w[j / 32].alive |= 1u << (j & 31);
        e.ready.push_back(&b->t[j]);
      }
      e.blocks.push_back(std::move(b));
    }
    rel(&e.start_tag);
    while (e.err.empty()) {
      Thread* t = e.next ? e.next : pick();
      e.next = nullptr;
      if (!t) break;
      if (!t->f) t->f = get_fiber(t);
      e.cur = t;
      hop(&e.main, t->f, false);
    }
    if (e.err.empty() && e.live) {
      e.err = "deadlock: " + std::to_string(e.live) + " threads can never run again:";
      std::map<std::string, std::pair<unsigned, std::string>> m;
      for (auto& b : e.blocks)
        for (auto& t : b->t)
          if (!t.done) {
            auto& x = m[std::string(t.wait ? t.wait : "?") + " " + where(t.file, t.line)];
            if (!x.first++) x.second = at(&t);
          }
      for (auto& [k, x] : m)
        e.err += "\n    " + std::to_string(x.first) + " wait at " + k + " (first: " + x.second + ")";
    }
    acq(&e.end_tag);
    for (auto& b : e.blocks) {
      for (auto& s : b->sh) free(s.second.first);
      free(b->dyn);
    }
    e.blocks.clear();
    e.ready.clear();
    e.grid.w.clear();
    if (__tsan_create_fiber || !e.err.empty()) free_fibers();
  }
  free_fibers();
  g = nullptr;
  if (!e.err.empty()) throw std::runtime_error("hexec: " + e.err);
}
}  // namespace hexec
#endif  // HEXEC_IMPLEMENTATION
