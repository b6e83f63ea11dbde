// Instructions in which the lanes of a warp take part together: shuffles, votes, reductions,
// barriers of a warp, ldmatrix.
//
// A handler is called once all lanes of the mask have arrived, and for all of them.
#include <algorithm>
#include <array>

#include "define.h"
#include "memory.h"

namespace simt {

namespace {

template <class F>
void for_lanes(Mask lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// result, whether the source is in range, value, b, c: see the pseudocode of shfl.sync
template <Shuffle mode>
void shuffle(Warp& warp, const Instruction& i, Mask lanes) {
  std::array<uint32_t, kWarpSize> values;
  std::copy_n(warp.reg<uint32_t>(i.operands[2]), kWarpSize, values.begin());
  for_lanes(lanes, [&](int lane) {
    const int b = warp.reg<uint32_t>(i.operands[3])[lane] & 31;
    const uint32_t c = warp.reg<uint32_t>(i.operands[4])[lane];
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment);
    int source = 0;
    switch (mode) {
      case Shuffle::kUp:
        source = lane - b;
        break;
      case Shuffle::kDown:
        source = lane + b;
        break;
      case Shuffle::kButterfly:
        source = lane ^ b;
        break;
      case Shuffle::kIndex:
        source = (lane & segment) | (b & ~segment);
        break;
    }
    const bool is_in_range = mode == Shuffle::kUp ? source >= last : source <= last;
    if (!is_in_range) source = lane;
    if (!(lanes >> source & 1))
      fault(warp, lane,
            "shuffle from lane " + std::to_string(source) + ", which is not in the mask");
    warp.reg<uint32_t>(i.operands[0])[lane] = values[source];
    warp.reg<bool>(i.operands[1])[lane] = is_in_range;
  });
}

Mask ballot(Warp& warp, uint32_t predicate, Mask lanes) {
  Mask result = 0;
  for_lanes(lanes, [&](int lane) { result |= Mask{warp.reg<bool>(predicate)[lane]} << lane; });
  return result;
}

template <class Result, class F>
void define_vote(const char* name, const F& f) {
  if (!kept<F>) kept<F> = new F(f);
  table().push_back({name, std::string("=") + type_name<Result>() + " pred b32",
                     [](Warp& warp, const Instruction& i, Mask lanes) {
                       const Mask votes = ballot(warp, i.operands[1], lanes);
                       for_lanes(lanes, [&](int lane) {
                         warp.reg<Result>(i.operands[0])[lane] = (*kept<F>)(votes, lanes);
                       });
                     },
                     Control::kCollective, 2});
}

template <class T, class F>
void define_reduction(const std::string& name, const F& f) {
  if (!kept<F>) kept<F> = new F(f);
  table().push_back({"redux." + name, "=b32 b32 b32",
                     [](Warp& warp, const Instruction& i, Mask lanes) {
                       const T* values = warp.reg<T>(i.operands[1]);
                       T result = values[__builtin_ctz(lanes)];
                       for_lanes(lanes & (lanes - 1),
                                 [&](int lane) { result = (*kept<F>)(result, values[lane]); });
                       for_lanes(lanes,
                                 [&](int lane) { warp.reg<T>(i.operands[0])[lane] = result; });
                     },
                     Control::kCollective, 2});
}

template <class T>
void match_any(Warp& warp, const Instruction& i, Mask lanes) {
  std::array<T, kWarpSize> values;
  std::copy_n(warp.reg<T>(i.operands[1]), kWarpSize, values.begin());
  for_lanes(lanes, [&](int lane) {
    Mask same = 0;
    for_lanes(lanes, [&](int other) { same |= Mask{values[other] == values[lane]} << other; });
    warp.reg<uint32_t>(i.operands[0])[lane] = same;
  });
}

// result, number of the barrier, number of threads or 0, predicate
template <class Result, class F>
void define_barrier(const char* name, const F& f) {
  if (!kept<F>) kept<F> = new F(f);
  table().push_back(
      {name, std::string("=") + type_name<Result>() + " b32 b32 pred",
       [](Warp& warp, const Instruction& i, Mask lanes) {
         const Barrier& barrier = warp.block->barriers[warp.reg<uint32_t>(i.operands[1])[0]];
         const Result result = (*kept<F>)(barrier.num_true, barrier.num_arrived);
         for_lanes(lanes, [&](int lane) { warp.reg<Result>(i.operands[0])[lane] = result; });
       },
       Control::kBarrier});
}

void warp_barrier(Warp& warp, const Instruction&, Mask lanes) {
  ++now;
  if (lanes == kAllLanes) {
    warp.synced = now;
    return;
  }
  warp.pair_synced.resize(kWarpSize * kWarpSize);
  for_lanes(lanes, [&](int lane) {
    for_lanes(lanes, [&](int other) { warp.pair_synced[lane * kWarpSize + other] = now; });
  });
}

// Matrices of 8 rows of 8 16-bit values: lane 8 m + r has the address of row r of matrix m; lane l
// receives of each matrix values 2 (l % 4) and the next, of row l / 4; with `trans`, of column l
// / 4.
template <bool is_transposed>
void load_matrix(Warp& warp, const Instruction& i, Mask) {
  const int count = i.num_operands - 1;
  const Actor all(warp, Actor::kWholeWarp);
  uint16_t rows[32][8];
  for (int r = 0; r < 8 * count; ++r) {
    const uint32_t address =
        warp.reg<uint32_t>(i.operands[count])[r] + static_cast<uint32_t>(i.immediate);
    std::memcpy(rows[r], shared_memory(all, Access::kRead, address, 16, 16), 16);
  }
  for (int m = 0; m < count; ++m)
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = is_transposed ? rows[8 * m + column][row] : rows[8 * m + row][column];
      const uint16_t high =
          is_transposed ? rows[8 * m + column + 1][row] : rows[8 * m + row][column + 1];
      warp.reg<uint32_t>(i.operands[m])[lane] = uint32_t{high} << 16 | low;
    }
}

}  // namespace

void define_warp_operations() {
  const char* const shuffle_types = "=b32 =pred b32 b32 b32 b32";
  table().push_back(
      {"shfl.up.b32", shuffle_types, &shuffle<Shuffle::kUp>, Control::kCollective, 5});
  table().push_back(
      {"shfl.down.b32", shuffle_types, &shuffle<Shuffle::kDown>, Control::kCollective, 5});
  table().push_back(
      {"shfl.bfly.b32", shuffle_types, &shuffle<Shuffle::kButterfly>, Control::kCollective, 5});
  table().push_back(
      {"shfl.idx.b32", shuffle_types, &shuffle<Shuffle::kIndex>, Control::kCollective, 5});
  define_vote<uint32_t>("vote.ballot.b32", [](Mask votes, Mask) { return votes; });
  define_vote<bool>("vote.any.pred", [](Mask votes, Mask) { return votes != 0; });
  define_vote<bool>("vote.all.pred", [](Mask votes, Mask lanes) { return votes == lanes; });
  define_vote<bool>("vote.uni.pred",
                    [](Mask votes, Mask lanes) { return votes == lanes || votes == 0; });
  const auto add = [](auto a, auto b) {
    return static_cast<decltype(a)>(uint32_t(a) + uint32_t(b));
  };
  const auto least = [](auto a, auto b) { return std::min(a, b); };
  const auto most = [](auto a, auto b) { return std::max(a, b); };
  define_reduction<uint32_t>("add.u32", add), define_reduction<int32_t>("add.s32", add);
  define_reduction<uint32_t>("min.u32", least), define_reduction<int32_t>("min.s32", least);
  define_reduction<uint32_t>("max.u32", most), define_reduction<int32_t>("max.s32", most);
  define_reduction<uint32_t>("and.b32", [](uint32_t a, uint32_t b) { return a & b; });
  define_reduction<uint32_t>("or.b32", [](uint32_t a, uint32_t b) { return a | b; });
  define_reduction<uint32_t>("xor.b32", [](uint32_t a, uint32_t b) { return a ^ b; });
  table().push_back(
      {"match.any.b32", "=b32 b32 b32", &match_any<uint32_t>, Control::kCollective, 2});
  table().push_back(
      {"match.any.b64", "=b32 b64 b32", &match_any<uint64_t>, Control::kCollective, 2});
  table().push_back(
      {"activemask.b32", "=b32", [](Warp& warp, const Instruction& i, Mask lanes) {
         for_lanes(lanes, [&](int lane) { warp.reg<uint32_t>(i.operands[0])[lane] = lanes; });
       }});
  table().push_back({"bar.warp", "b32", &warp_barrier, Control::kCollective, 0});
  table().push_back({"ldmatrix.b16", "=b32* address", &load_matrix<false>, Control::kCollective});
  table().push_back(
      {"ldmatrix.trans.b16", "=b32* address", &load_matrix<true>, Control::kCollective});
  table().push_back({"bar.sync", "b32 b32", nullptr, Control::kBarrier});
  table().push_back({"bar.arrive", "b32 b32", nullptr, Control::kArrive});
  define_barrier<uint32_t>("bar.red.popc.u32",
                           [](uint32_t num_true, uint32_t) { return num_true; });
  define_barrier<bool>("bar.red.and.pred",
                       [](uint32_t num_true, uint32_t n) { return num_true == n; });
  define_barrier<bool>("bar.red.or.pred", [](uint32_t num_true, uint32_t) { return num_true > 0; });
  table().push_back({"bra", "", nullptr, Control::kBranch});
  table().push_back({"exit", "", nullptr, Control::kExit});
}

}  // namespace simt
