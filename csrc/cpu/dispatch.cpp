// Which ISA's table of microkernels is in use.

#include <cstring>

#include "cpu/conv2d.h"

namespace sparsekit {
namespace {

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "zen4")) return cpu_supports("zen4") ? &zen4::kernels : nullptr;
  if (!std::strcmp(name, "avx512")) return cpu_supports("avx512") ? &avx512::kernels : nullptr;
  if (!std::strcmp(name, "avx2")) return cpu_supports("avx2") ? &avx2::kernels : nullptr;
#endif
  return std::strcmp(name, "generic") ? nullptr : &generic::kernels;
}

const Kernels* active = find(best_isa());

}  // namespace

bool cpu_supports(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // What -march=x86-64-v3 and -v4 allow the compiler to use, so what the whole file needs.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512") || !std::strcmp(isa, "zen4")) return v4;
  if (!std::strcmp(isa, "avx2")) return v3;
#endif
  return !std::strcmp(isa, "generic");
}

const char* best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (cpu_supports("zen4") && __builtin_cpu_is("amdfam19h")) return "zen4";
#endif
  return cpu_supports("avx512") ? "avx512" : cpu_supports("avx2") ? "avx2" : "generic";
}

bool set_isa(const char* isa) {
  const Kernels* found = find(isa);
  if (found) active = found;
  return found != nullptr;
}

const Kernels& kernels() { return *active; }

}  // namespace sparsekit
