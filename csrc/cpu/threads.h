// One team of threads for the process. Work is handed out in small pieces that any thread may take,
// the caller among them, so a phase never waits for a thread that has taken nothing: when another
// program holds a core, the others go on without it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

namespace leangpt::cpu {

class Team {
 public:
  // The process's team; made anew in a child of fork(), whose threads are gone.
  static Team& get();

  ~Team();
  int num_threads() const;
  // From 1 on; the caller counts as one. Waits for its turn.
  void set_num_threads(int count);

  // A turn: whoever calls `run` holds one, which callers in several threads get one after another.
  std::unique_lock<std::mutex> turn();

  // Call f(item, thread) for each item in [0, items), on several threads; return when all are done.
  template <class F>
  void run(int64_t items, const F& f) {
    run_erased(
        items,
        [](const void* context, int64_t item, int thread) {
          (*static_cast<const F*>(context))(item, thread);
        },
        &f);
  }

 private:
  using Function = void (*)(const void* context, int64_t item, int thread);
  struct State;
  Team();
  void run_erased(int64_t items, Function function, const void* context);
  std::unique_ptr<State> state_;
};

// The processors that this process may use.
int available_processors();

}  // namespace leangpt::cpu
