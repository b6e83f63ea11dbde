#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace leangpt::cpu {
namespace {

bool is_supported(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
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
  constexpr Isa kBestFirst[] = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
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
      std::string("LEANGPT_CPU_ISA must be avx512_bf16, avx512, avx2 or portable, got ") + forced);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
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
