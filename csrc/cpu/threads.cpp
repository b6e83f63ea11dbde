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

// A phase is published by its ticket: a number of the phase (high half) and the next item that
// nobody has taken (low half). A thread takes items by moving the ticket on, which fails once the
// phase is another one; the fields of a phase stay as they are until all of its items are done, so
// whoever holds an item has read the right ones.
struct Team::State {
  alignas(64) std::atomic<uint64_t> ticket{0};
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

  static constexpr uint64_t kItemMask = 0xFFFFFFFF;

  bool has_work(uint64_t t) const {
    return static_cast<int64_t>(t & kItemMask) < items.load(std::memory_order_acquire);
  }

  // Take and do items of the current phase until none are left.
  void help(int thread) {
    const int threads = static_cast<int>(workers.size()) + 1;
    uint64_t t = ticket.load(std::memory_order_acquire);
    while (true) {
      const int64_t count = items.load(std::memory_order_acquire);
      const int64_t first = static_cast<int64_t>(t & kItemMask);
      if (first >= count) return;
      const Function f = function.load(std::memory_order_relaxed);
      const void* c = context.load(std::memory_order_relaxed);
      // large shares at first, single items at the end
      const int64_t share = std::max<int64_t>(1, (count - first) / (4 * threads));
      if (!ticket.compare_exchange_weak(t, t + static_cast<uint64_t>(share),
                                        std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      for (int64_t item = first; item < first + share; ++item) f(c, item, thread);
      if (done.fetch_add(share, std::memory_order_seq_cst) + share == count &&
          is_caller_sleeping.load(std::memory_order_seq_cst)) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
      }
      t = ticket.load(std::memory_order_acquire);
    }
  }

  void work_loop(int thread) {
    while (true) {
      const auto is_ready = [&] {
        return has_work(ticket.load(std::memory_order_acquire)) ||
               is_stopping.load(std::memory_order_relaxed);
      };
      if (!spin(kSpinForWork, is_ready)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping_workers.fetch_add(1, std::memory_order_seq_cst);
        work.wait(lock, [&] {
          return has_work(ticket.load(std::memory_order_seq_cst)) ||
                 is_stopping.load(std::memory_order_relaxed);
        });
        sleeping_workers.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (is_stopping.load(std::memory_order_relaxed)) return;
      help(thread);
    }
  }

  void start(int count) {
    is_stopping = false;
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
  const uint64_t phase = (s.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  // The old ticket must not look as if it had more items, so it is closed before the number of
  // items changes.
  s.ticket.store((phase << 32) | State::kItemMask, std::memory_order_seq_cst);
  s.items.store(items, std::memory_order_release);
  s.ticket.store((phase + 1) << 32, std::memory_order_seq_cst);
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
