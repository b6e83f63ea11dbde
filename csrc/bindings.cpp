// The only C++ file that sees torch: op schemas, argument checks, and the CPU half of torch's
// dispatch.
#include <torch/library.h>

#include <string>

#include "cpu/isa.h"

TORCH_LIBRARY(leangpt, m) {
  m.def("cpu_isa() -> str",
        []() -> std::string { return leangpt::cpu::isa_name(leangpt::cpu::active_isa()); });
}
