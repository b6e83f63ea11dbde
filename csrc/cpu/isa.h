// Which vector instructions the CPU kernels use, decided once per process.
#pragma once

namespace leangpt::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best ISA that this CPU and operating system support, or the one $LEANGPT_CPU_ISA names.
// Throws std::runtime_error where that one is misspelt or not supported.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace leangpt::cpu
