#include "linear.h"

#include <algorithm>

namespace leangpt::cpu {
namespace {

constexpr int64_t kRowBlock = 96;  // rows of a tile: with its panels they stay in the L2 cache
constexpr int64_t kTileFloats = kRowBlock * kPanelWidth;

}  // namespace

void Linear::make_room(const Matrix& w, int64_t rows) {
  const int64_t bytes = kernels().activation_row_bytes(w), groups = w.groups();
  activations_ = {rows_.get(rows * bytes), bytes, scales_.get(rows * groups),
                  offsets_.get(rows * groups * w.digits), sums_.get(rows * groups)};
}

void Linear::multiply(const Matrix& w, int64_t rows, float* out, int64_t stride, bool adds,
                      Activation activation) {
  Team& team = Team::get();
  float* room = tiles_.get(team.num_threads() * kTileFloats);
  const int64_t panels = w.panels(), blocks = (rows + kRowBlock - 1) / kRowBlock;
  team.run(panels * blocks, [&](int64_t item, int thread) {
    const int64_t first_row = item / panels * kRowBlock;
    kernels().linear_tile(w, activations_, first_row,
                          static_cast<int>(std::min(kRowBlock, rows - first_row)),
                          static_cast<int>(item % panels), room + thread * kTileFloats,
                          {out + first_row * stride, stride, adds, activation});
  });
}

}  // namespace leangpt::cpu
