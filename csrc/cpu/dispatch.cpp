// Chooses the instruction set at the first call.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace zsq::cpu {
namespace portable {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {
const Kernels& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ZSQ_CPU_ISA");
  const auto is = [wish](const char* isa) { return wish && !std::strcmp(wish, isa); };
  const bool free_choice = !is("avx512") && !is("avx2") && !is("portable");  // an unknown name is no wish
  const auto allowed = [&](const char* isa) { return free_choice || is(isa); };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return avx512::table;
  if (allowed("avx2") && __builtin_cpu_supports("avx2")) return avx2::table;
#endif
  return portable::table;
}
}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}
}  // namespace zsq::cpu
