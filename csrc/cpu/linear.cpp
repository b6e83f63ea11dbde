#include "linear.h"

#include <algorithm>

namespace leangpt::cpu {

namespace {
constexpr int64_t kRowsTogether = 32;  // fewer cost more than they share out
}

void Linear::make_room(const Matrix& w, int64_t rows) {
  const int64_t bytes = kernels().activation_row_bytes(w), groups = w.groups();
  activations_ = {rows_.get(rows * bytes), bytes, scales_.get(rows * groups),
                  offsets_.get(rows * groups * w.digits), sums_.get(rows * groups)};
}

template <class F>
void Linear::multiply_some(const Matrix& w, int64_t rows, int64_t panels, const F& panel_of,
                           const Epilogue& epilogue) {
  Team& team = Team::get();
  const Kernels& k = kernels();
  float* room = tiles_.get(team.num_threads() * k.tile_floats);
  // many threads share few panels: then each takes fewer rows of one
  const int64_t wanted = (4 * team.num_threads() + panels - 1) / std::max<int64_t>(panels, 1);
  const int64_t most = std::min<int64_t>(
      k.max_tile_rows, round_up((std::max<int64_t>(rows, 1) + wanted - 1) / wanted, kRowsTogether));
  const int64_t blocks = (rows + most - 1) / most;
  team.run(panels * blocks, [&](int64_t item, int thread) {
    const int64_t first_row = item / panels * most;
    Epilogue shifted = epilogue;
    shifted.out += first_row * epilogue.stride;
    if (epilogue.addends) shifted.addends += first_row;
    k.linear_tile(w, activations_, first_row, static_cast<int>(std::min(most, rows - first_row)),
                  static_cast<int>(panel_of(item % panels)), room + thread * k.tile_floats,
                  shifted);
  });
}

void Linear::multiply(const Matrix& w, int64_t rows, const Epilogue& epilogue) {
  multiply_some(w, rows, w.panels(), [](int64_t i) { return i; }, epilogue);
}

void Linear::multiply_panels(const Matrix& w, int64_t rows, const std::vector<int32_t>& panels,
                             float* out, int64_t stride) {
  multiply_some(w, rows, static_cast<int64_t>(panels.size()), [&](int64_t i) { return panels[i]; },
                {out, stride, false, Activation::kNone});
}

}  // namespace leangpt::cpu
