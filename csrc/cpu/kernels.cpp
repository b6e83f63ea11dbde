#include "kernels.h"

#include "isa.h"

namespace leangpt::cpu {

const Kernels& kernels() {
  static const Kernels& table = [&]() -> const Kernels& {
    switch (active_isa()) {
#if defined(__x86_64__)
      case Isa::kAmx:
        return amx::kTable;
      case Isa::kAvx512Bf16:
        return avx512_bf16::kTable;
      case Isa::kAvx512:
        return avx512::kTable;
      case Isa::kAvx2:
        return avx2::kTable;
#endif
      default:
        return portable::kTable;
    }
  }();
  return table;
}

}  // namespace leangpt::cpu
