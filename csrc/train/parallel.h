// Work on the threads of the caller's pool: bindings_train.cpp has them of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace leangpt::train {

int num_threads();

// f(t) for 0 <= t < count, each on a thread of its own; within such a call, one after the other.
void run_threads(int64_t count, const std::function<void(int64_t)>& f);

// Covers 0 <= i < n by calls f(begin, end), in parallel where n is more than 1.
void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f);

}  // namespace leangpt::train
