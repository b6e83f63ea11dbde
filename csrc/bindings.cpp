// The only C++ file that sees torch: op schemas, argument checks, and the CPU half of torch's
// dispatch.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

TORCH_LIBRARY(leangpt, m) {
  m.def("built_for() -> str", []() -> std::string { return TORCH_VERSION; });
}
