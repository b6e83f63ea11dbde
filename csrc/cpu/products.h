// How products run where the CPU's instructions leave no more to gain. products_avx2.h has the same
// names.

// A tile of at most so many rows asks for its weights ahead.
constexpr int kFetchingRows = kFetchesTwice ? 4 : 2;
// Sums that fit the registers beside what the ceilings multiply.
constexpr int kCeilingSums =
    kTileRows * tile_vecs(kTileRows) < 12 ? kTileRows * tile_vecs(kTileRows) : 12;

// int4 weights are multiplied as int8 ones, and a group is summed at once.
constexpr int kInt4Steps = 1 << 20;
using Int4Sum = IVec;
static inline Int4Sum start_int4_sum(IVec sum) { return sum; }
static inline Int4Sum dot_int4(Int4Sum sum, Int8Weights w, const int8_t* a) {
  return dot_int8(sum, w, a);
}
static inline IVec finish_int4_sum(IVec, Int4Sum sum) { return sum; }

// Whether attention reads an int8 cache as WidenedInt8Format.
constexpr bool kWidensInt8Cache = false;
struct WidenedInt8Format;
