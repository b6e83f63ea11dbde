// Work is shared among the threads that torch has.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "train/parallel.h"

namespace leangpt::train {

int num_threads() { return at::get_num_threads(); }

void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t threads = std::min<int64_t>(n, num_threads());
  if (threads <= 1) {
    if (n > 0) f(0, n);
    return;
  }
  // A share for each thread, the same rows in every op, so that they are in its cache; who is done
  // with its own helps the others, a piece at a time.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = t * n / threads;
    shares[t].end = (t + 1) * n / threads;
  }
  const int64_t piece = std::max<int64_t>(1, n / (8 * threads));
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares[(first + t) % threads];
      for (int64_t begin; (begin = share.next.fetch_add(piece)) < share.end;) {
        f(begin, std::min(share.end, begin + piece));
      }
    }
  });
}

}  // namespace leangpt::train
