#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace leangpt::train {
namespace {

// What a thread begins with: the same rows in every op, so that they are in its cache.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t threads = std::min<int64_t>(n, num_threads());
  if (threads <= 1) {
    if (n > 0) f(0, n);
    return;
  }
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = t * n / threads;
    shares[t].end = (t + 1) * n / threads;
  }
  const int64_t piece = std::max<int64_t>(1, n / (8 * threads));
  run_threads(threads, [&](int64_t own) {
    for (int64_t t = 0; t < threads; ++t) {  // its own share, then what is left of the others'
      Share& share = shares[(own + t) % threads];
      for (int64_t begin; (begin = share.next.fetch_add(piece)) < share.end;) {
        f(begin, std::min(share.end, begin + piece));
      }
    }
  });
}

}  // namespace leangpt::train
