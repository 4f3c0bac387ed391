// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace vosops {
namespace {

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const Kernels* find(const char* name) {
  for (const Kernels* candidate : usable_kernels())
    if (std::strcmp(candidate->name, name) == 0) return candidate;
  return nullptr;
}

const Kernels* initial() {
  const char* asked = std::getenv("VOSOPS_CPU_ISA");
  if (!asked || !*asked) return usable_kernels().front();
  const Kernels* found = find(asked);
  if (found) return found;
  std::fprintf(stderr, "vosops: VOSOPS_CPU_ISA=%s cannot run on this CPU; using %s\n", asked,
               usable_kernels().front()->name);
  return usable_kernels().front();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{initial()};
  return chosen;
}

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = detect();
  return usable;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace vosops

bool vosops_set_cpu_isa(const char* name) {
  const vosops::Kernels* found = vosops::find(name);
  if (found) vosops::current() = found;
  return found != nullptr;
}

const char* vosops_cpu_isa() { return vosops::kernels().name; }

const char* vosops_usable_isa(int index) {
  const auto& usable = vosops::usable_kernels();
  return index >= 0 && index < int(usable.size()) ? usable[index]->name : nullptr;
}
