#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace leangpt::cpu {
namespace {

using Clock = std::chrono::steady_clock;
// Between the phases of a step work comes within microseconds, between steps within some tens of
// them.
constexpr auto kSpinForWork = std::chrono::microseconds(150);
constexpr auto kSpinForOthers = std::chrono::microseconds(30);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spin until `is_ready` or the time is over; return whether it is ready.
template <class F>
bool spin(Clock::duration time, const F& is_ready) {
  if (is_ready()) return true;
  const auto end = Clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      pause();
      if (is_ready()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

// A phase gives each thread a range of its items, one after the other, so that each reads weights
// as one stream, and the same ones in every step. Who has done its own takes the last ones of the
// others. Whoever holds an item knows that the phase is not over, and that function and context are
// those of the item.
struct Team::State {
  // The items that nobody has taken: from the high half on, up to the low one.
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};
  };

  std::vector<Range> ranges;  // of each thread
  alignas(64) std::atomic<uint64_t> phase{0};
  std::atomic<int64_t> items{0};
  std::atomic<Function> function{nullptr};
  std::atomic<const void*> context{nullptr};
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int> sleeping_workers{0};
  std::atomic<bool> is_caller_sleeping{false};
  std::atomic<bool> is_stopping{false};
  std::mutex mutex, turn;
  std::condition_variable work, finished;
  std::vector<std::thread> workers;

  static uint64_t make_range(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t begin_of(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static int64_t end_of(uint64_t range) { return static_cast<int64_t>(range & 0xFFFFFFFF); }

  // Take an item of a thread's range, the first one if it is the thread's own; -1: none is left.
  int64_t take(int thread, bool is_own) {
    std::atomic<uint64_t>& left = ranges[thread].left;
    uint64_t range = left.load(std::memory_order_acquire);
    while (begin_of(range) < end_of(range)) {
      const int64_t begin = begin_of(range) + (is_own ? 1 : 0);
      const int64_t end = end_of(range) - (is_own ? 0 : 1);
      if (left.compare_exchange_weak(range, make_range(begin, end), std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
        return is_own ? begin - 1 : end;
      }
    }
    return -1;
  }

  // Take and do items of the current phase until none are left.
  void help(int thread) {
    const int threads = static_cast<int>(ranges.size());
    int64_t count = 0;
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread + i) % threads;
      for (int64_t item; (item = take(owner, i == 0)) >= 0; ++count) {
        const Function f = function.load(std::memory_order_relaxed);
        f(context.load(std::memory_order_relaxed), item, thread);
      }
    }
    if (count == 0) return;
    const int64_t all = items.load(std::memory_order_relaxed);
    if (done.fetch_add(count, std::memory_order_seq_cst) + count == all &&
        is_caller_sleeping.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_one();
    }
  }

  void work_loop(int thread) {
    uint64_t seen = 0;
    while (true) {
      const auto is_ready = [&] {
        return phase.load(std::memory_order_seq_cst) != seen ||
               is_stopping.load(std::memory_order_relaxed);
      };
      if (!spin(kSpinForWork, is_ready)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping_workers.fetch_add(1, std::memory_order_seq_cst);
        work.wait(lock, is_ready);
        sleeping_workers.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (is_stopping.load(std::memory_order_relaxed)) return;
      seen = phase.load(std::memory_order_seq_cst);
      help(thread);
    }
  }

  void start(int count) {
    is_stopping = false;
    ranges = std::vector<Range>(count);
    for (int i = 1; i < count; ++i) workers.emplace_back([this, i] { work_loop(i); });
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_stopping = true;
    }
    work.notify_all();
    for (auto& worker : workers) worker.join();
    workers.clear();
  }
};

namespace {
Team* the_team = nullptr;
std::mutex team_mutex;
int wanted_threads = 0;

void forget_team_after_fork() {
  // Its threads do not exist in the child, so it cannot be ended: it is left to itself.
  the_team = nullptr;
  new (&team_mutex) std::mutex;
}
}  // namespace

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

Team& Team::get() {
  std::lock_guard<std::mutex> lock(team_mutex);
  if (the_team == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_team_after_fork);
    static_cast<void>(registered);
    the_team = new Team();  // never deleted: threads may still wait in it when the process ends
  }
  return *the_team;
}

Team::Team() : state_(std::make_unique<State>()) {
  state_->start(wanted_threads > 0 ? wanted_threads : available_processors());
}

Team::~Team() { state_->stop(); }

int Team::num_threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void Team::set_num_threads(int count) {
  if (count < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(count));
  }
  const auto mine = turn();
  wanted_threads = count;
  if (count == num_threads()) return;
  state_->stop();
  state_->start(count);
}

std::unique_lock<std::mutex> Team::turn() { return std::unique_lock<std::mutex>(state_->turn); }

void Team::run_erased(int64_t items, Function function, const void* context) {
  if (items == 1 || state_->workers.empty()) {
    for (int64_t item = 0; item < items; ++item) function(context, item, 0);
    return;
  }
  if (items <= 0) return;
  State& s = *state_;
  s.function.store(function, std::memory_order_relaxed);
  s.context.store(context, std::memory_order_relaxed);
  s.done.store(0, std::memory_order_relaxed);
  s.items.store(items, std::memory_order_relaxed);
  const int64_t threads = num_threads();
  for (int64_t t = 0; t < threads; ++t) {
    s.ranges[t].left.store(State::make_range(items * t / threads, items * (t + 1) / threads),
                           std::memory_order_release);
  }
  s.phase.fetch_add(1, std::memory_order_seq_cst);
  if (s.sleeping_workers.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.work.notify_all();
  }
  s.help(0);
  const auto is_done = [&] { return s.done.load(std::memory_order_acquire) == items; };
  if (!spin(kSpinForOthers, is_done)) {
    std::unique_lock<std::mutex> lock(s.mutex);
    s.is_caller_sleeping.store(true, std::memory_order_seq_cst);
    s.finished.wait(lock, [&] { return s.done.load(std::memory_order_seq_cst) == items; });
    s.is_caller_sleeping.store(false, std::memory_order_relaxed);
  }
}

}  // namespace leangpt::cpu
