// Which ISA's table of microkernels is in use.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

#include "cpu/conv2d.h"
#include "cpu/tiles.h"

namespace sparsekit {
namespace {

#if defined(__x86_64__)
// Those for AVX-512, and products of tiles.
const Kernels& with_tiles() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kernels;
    k.name = "amx";
    k.tiles = &amx::kernels;
    return k;
  }();
  return kernels;
}

// Whether the operating system lets this process use tiles, for which it has to be asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// CPUID leaf 7 says it of AMX-BF16 and AMX-TILE; not every compiler's __builtin_cpu_supports does.
bool has_tiles() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}
#endif

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "amx")) return cpu_supports("amx") ? &with_tiles() : nullptr;
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
  if (!std::strcmp(isa, "amx")) return v4 && has_tiles() && may_use_tiles();
  if (!std::strcmp(isa, "avx512") || !std::strcmp(isa, "zen4")) return v4;
  if (!std::strcmp(isa, "avx2")) return v3;
#endif
  return !std::strcmp(isa, "generic");
}

const char* best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (cpu_supports("zen4") && __builtin_cpu_is("amdfam19h")) return "zen4";
  if (cpu_supports("amx")) return "amx";
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
