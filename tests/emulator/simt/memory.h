// Checked access to shared memory, for the warp operations that use it.
#pragma once
#include "shadow.h"

namespace simt {

// The memory at an offset, after all checks; `stored` is what is about to be written, if known.
std::byte* shared_memory(const Actor& actor, Access access, uint64_t offset, size_t num_bytes,
                         size_t alignment, const std::byte* stored = nullptr);

}  // namespace simt
