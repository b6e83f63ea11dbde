// Threads of the caller's pool: bindings_parallel.cpp has them of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace leangpt::train {

int num_threads();

// Covers 0 <= i < n by calls f(begin, end), in parallel where n is more than 1.
void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f);

}  // namespace leangpt::train
