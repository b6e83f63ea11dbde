#include "kernels.h"

#include "../cpu/isa.h"

namespace leangpt::train {

const Kernels& kernels() {
  static const Kernels& table = [&]() -> const Kernels& {
    switch (cpu::active_isa()) {
#if defined(__x86_64__)
      case cpu::Isa::kAmx:
        return amx::kTable;
      case cpu::Isa::kAvx512Bf16:
        return avx512_bf16::kTable;
      case cpu::Isa::kAvx512:
        return avx512::kTable;
      case cpu::Isa::kAvx2:
        return avx2::kTable;
#endif
      default:
        return portable::kTable;
    }
  }();
  return table;
}

}  // namespace leangpt::train
