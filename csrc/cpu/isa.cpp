#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace leangpt::cpu {
namespace {

#if defined(__x86_64__)
// Whether the CPU has tiles of bf16 and of bytes, and the operating system lets this process use
// them: their registers are large, so Linux wants to be asked.
bool can_use_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBits) != kBits) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool is_supported(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      return is_supported(Isa::kAvx512Bf16) && can_use_amx();
    case Isa::kAvx512Bf16:
      return is_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx2:  // every CPU with AVX2 and FMA has F16C
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    case Isa::kPortable:
      return true;
    default:
      return false;
  }
}

Isa choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  constexpr Isa kBestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2,
                                Isa::kPortable};
  const char* forced = std::getenv("LEANGPT_CPU_ISA");
  for (Isa isa : kBestFirst) {
    if (forced == nullptr) {
      if (is_supported(isa)) return isa;
    } else if (std::string(forced) == isa_name(isa)) {
      if (is_supported(isa)) return isa;
      throw std::runtime_error(std::string("LEANGPT_CPU_ISA=") + forced +
                               ": not supported by this CPU");
    }
  }
  throw std::runtime_error(
      std::string("LEANGPT_CPU_ISA must be amx, avx512_bf16, avx512, avx2 or portable, got ") +
      forced);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace leangpt::cpu
