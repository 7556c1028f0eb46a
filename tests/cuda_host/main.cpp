// Runs every kernel on shapes that reach each of its paths, for the sanitizer builds. Buffers have exactly the
// documented sizes, so that a sanitizer sees an access one element outside. Results must not depend on the order of
// threads, and weights are checked against a plain loop (everything else is compared with the reference by
// test_cuda_host.py). Usage: main SEEDS [FAMILY...]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/common.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/stream.h"

namespace {
using namespace zsq::cuda;
template <class T>
using Buffer = std::vector<T>;
std::mt19937 rng;

void must(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}
void done(cudaError_t e, const char* what) { must(e == cudaSuccess, what); }

template <class T>
Buffer<T> normal(size_t n, double size = 1) {
  std::normal_distribution<double> d(0, size);
  Buffer<T> b(n);
  for (T& x : b) x = static_cast<T>(d(rng));
  return b;
}
template <class T>
void append(Buffer<double>& log, const Buffer<T>& b) {
  log.insert(log.end(), b.begin(), b.end());
}

#include "main_bn_act.inc"
#include "main_bn_stats.inc"
#include "main_common.inc"
#include "main_fake_quant.inc"
#include "main_gi_sgd.inc"
#include "main_learned_step.inc"
#include "main_losses.inc"

#define ZSQ_FAMILY(name) {#name, run_##name}
const std::pair<std::string, void (*)(Buffer<double>&)> families[] = {
    ZSQ_FAMILY(bn_act),       ZSQ_FAMILY(bn_stats), ZSQ_FAMILY(fake_quant), ZSQ_FAMILY(gi_sgd),
    ZSQ_FAMILY(learned_step), ZSQ_FAMILY(losses),   ZSQ_FAMILY(common),
};

// FNV-1a over the bit patterns, so that two builds can be compared.
unsigned long long digest(const Buffer<double>& log) {
  unsigned long long h = 14695981039346656037ull;
  for (double v : log) h = (h ^ hexec::pack(v)) * 1099511628211ull;
  return h;
}
}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 2;
  const std::set<std::string> wanted(argv + std::min(argc, 2), argv + argc);
  size_t chosen = 0;
  for (const auto& family : families) chosen += wanted.count(family.first);
  must(chosen == wanted.size(), "no such family");
  Buffer<double> first;
  for (int seed = 0; seed < seeds; ++seed) {
    hexec::options().seed = static_cast<uint64_t>(seed);
    Buffer<double> log;
    for (const auto& [name, run] : families)
      if (wanted.empty() || wanted.count(name)) rng.seed(7), run(log);
    if (seed == 0) first = log;
    must(log == first, "results depend on the order of threads");
  }
  std::printf("all kernels ran: %llu launches, %zu values, digest %016llx\n", hexec::launches(), first.size(),
              digest(first));
}
