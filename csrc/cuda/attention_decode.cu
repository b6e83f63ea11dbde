// Attention of a step's queries to the paged keys and values of their sequences.
//
// A block takes up to 16 queries that see the keys of one head: the query heads of its group, of as
// many rows of a sequence as there is room for. They are the rows of mma.m16n8k16, which computes
// each of them alone. The keys are taken in splits of 256. Within one, warp w has the pages w, w +
// kWarps, .. and runs an online softmax over them; then the warps are merged in their order, and
// the splits in theirs. Splits and pages are cut by place alone, so a query has the same bits
// whichever others are in its tile, and however the splits are spread: over blocks, whose results
// another kernel merges, or one after the other in one block.
//
// A page of a head is one piece of memory (kv_layout.cuh), which a warp copies to shared memory as
// it is, while it computes the pages before.
//
// References: Dao, 2023, https://arxiv.org/abs/2307.08691;
// Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bytes.cuh"
#include "kv_layout.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace leangpt::cuda {
namespace {

constexpr int kTileQueries = 16;
constexpr int kSplitPages = kSplitKeys / kPageSize;
constexpr float kLog2E = 1.44269504f;
// What the results of splits may take before a block takes all splits of its queries instead.
constexpr int64_t kMostScratchFloats = int64_t{32} << 20;

// How a block of up to kSteps times 16 dimensions works.
template <int kSteps>
struct Plan {
  static constexpr int kWarps = kSteps > 8 ? 2 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kSteps > 4 ? 2 : 4;  // pages of a warp that are on their way
  static constexpr int kQueryThreads = kThreads / kTileQueries;  // that merge a query
};

struct Params {
  AttentionArgs args;
  HeadShape shape;
  StepRows rows;
  KvLayer layer;
  int heads;  // of a group that attend together,
  int turns;  // and how many times until all have
  int num_splits;
};

// The first key that a query at a place sees.
__device__ int first_seen(int place, int sliding_window) {
  return sliding_window ? max(0, place + 1 - sliding_window) : 0;
}

// Floats of a split's result: the largest score, the sum of the weights, two unused, the sums.
__host__ __device__ int64_t state_floats(int num_steps) { return 4 + num_steps * kStepDims; }

// Of some keys: the largest score, in units of ln 2, and the sum of the weights relative to it.
struct alignas(8) Softmax {
  float largest, total;  // total 0: of no keys
};
// What the sums of weighted values of two are multiplied with before they are added.
struct Factors {
  float first, second;
};
// `into` becomes the softmax of the keys of both. Rounding is spelled out here, so that all who
// merge have the same bits.
__device__ __forceinline__ Factors merge(Softmax& into, const Softmax& other) {
  if (other.total == 0.0f) return {1.0f, 0.0f};
  if (into.total == 0.0f) {
    into = other;
    return {0.0f, 1.0f};
  }
  const float largest = fmaxf(into.largest, other.largest);
  const Factors f = {exp2f(into.largest - largest), exp2f(other.largest - largest)};
  into = {largest, __fmaf_rn(other.total, f.second, __fmul_rn(into.total, f.first))};
  return f;
}
__device__ __forceinline__ float merge(float into, float other, const Factors& f) {
  return __fmaf_rn(other, f.second, __fmul_rn(into, f.first));
}
__device__ __forceinline__ float4 merge(const float4& a, const float4& b, const Factors& f) {
  return {merge(a.x, b.x, f), merge(a.y, b.y, f), merge(a.z, b.z, f), merge(a.w, b.w, f)};
}

// The weighted mean of 4 dimensions, from `dim` on, of those that there are.
__device__ void store_out(uint16_t* out, const float4& sums, float total, int dim, int head_dim) {
  // -0 becomes 0: which of them it was depends on keys that were not seen
  const auto mean = [inverse = 1.0f / total](float sum) { return sum * inverse + 0.0f; };
  const uint2 means = {pack_bf16(mean(sums.x), mean(sums.y)),
                       pack_bf16(mean(sums.z), mean(sums.w))};
  if (head_dim % 4 == 0) {
    if (dim < head_dim) *reinterpret_cast<uint2*>(out + dim) = means;
    return;
  }
  for (int i = 0; i < 4 && dim + i < head_dim; ++i) {
    out[dim + i] = static_cast<uint16_t>((i < 2 ? means.x : means.y) >> i % 2 * 16);
  }
}

// The share of a lane in 16 dimensions of a page's keys or values: the operands of two tiles.
struct Operands {
  uint32_t first[2], second[2];
};
template <KvKind kKind>
__device__ __forceinline__ Operands load_operands(const uint8_t* elements, int step, int lane) {
  const int at = (step * 32 + lane) * kLaneElements;
  if constexpr (kKind == KvKind::kFp8) {
    const uint2 two = *reinterpret_cast<const uint2*>(elements + at);
    return {
        {fp8_to_bf16(__byte_perm(two.x, 0, 0x1404)), fp8_to_bf16(__byte_perm(two.x, 0, 0x3424))},
        {fp8_to_bf16(__byte_perm(two.y, 0, 0x1404)), fp8_to_bf16(__byte_perm(two.y, 0, 0x3424))}};
  } else if constexpr (kKind == KvKind::kInt8) {
    const uint2 two = *reinterpret_cast<const uint2*>(elements + at);
    return {{bytes_to_bf16(__byte_perm(two.x, 0, 0x4140)),
             bytes_to_bf16(__byte_perm(two.x, 0, 0x4342))},
            {bytes_to_bf16(__byte_perm(two.y, 0, 0x4140)),
             bytes_to_bf16(__byte_perm(two.y, 0, 0x4342))}};
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(elements + at * 2);
    return {{four.x, four.y}, {four.z, four.w}};
  }
}

template <KvKind kKind>
__device__ __forceinline__ void mma(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (kKind == KvKind::kFp16) {
    mma_fp16(sum, a.x, a.y, a.z, a.w, b0, b1);
  } else {
    mma_bf16(sum, a.x, a.y, a.z, a.w, b0, b1);
  }
}
template <KvKind kKind>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return kKind == KvKind::kFp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

// Copy the queries of a tile to shared memory, by all threads of a block: for each 16 dimensions,
// what each lane has of an operand. Queries that are not there are zero.
template <int kThreads>
__device__ void load_queries(const Params& p, const AttentionTile& tile, int first_head,
                             int num_steps, uint4* operands) {
  const int D = p.shape.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < num_steps * 32; i += kThreads) {
    const int lane = i % 32, dim = i / 32 * kStepDims + lane % 4 * 4;
    uint2 rows[2] = {};
    for (int j = 0; j < 2; ++j) {
      const int query = lane / 4 + 8 * j, row = tile.first_row + query / p.heads;
      if (query >= tile.num_rows * p.heads) continue;
      const uint16_t* from =
          p.args.queries + row * p.args.stride + (first_head + query % p.heads) * D;
      if (D % 4 == 0) {
        if (dim < D) rows[j] = *reinterpret_cast<const uint2*>(from + dim);
      } else {
        const auto at = [&](int d) { return d < D ? uint32_t{from[d]} : 0u; };
        rows[j] = {at(dim) | at(dim + 1) << 16, at(dim + 2) | at(dim + 3) << 16};
      }
    }
    operands[i] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
  }
}

// Two queries of a lane, rows lane / 4 and lane / 4 + 8 of its tile, for all of a split's keys that
// a warp has.
template <int kSteps, KvKind kKind>
struct WarpTile {
  int first_key[2], last_key[2];  // that a query sees; none: last < first
  Softmax softmax[2];             // total: of the lane's own keys
  float sums[2 * kSteps][4];

  __device__ __forceinline__ WarpTile(const Params& p, const AttentionTile& tile, int lane) {
    for (int i = 0; i < 2; ++i) {
      const int query = lane / 4 + 8 * i;
      const bool is_there = query < tile.num_rows * p.heads;
      last_key[i] = is_there ? p.rows.places[tile.first_row + query / p.heads] : -1;
      first_key[i] = first_seen(last_key[i], p.args.sliding_window);
    }
  }

  __device__ __forceinline__ void clear() {
    for (Softmax& s : softmax) s = {-INFINITY, 0.0f};
#pragma unroll
    for (auto& tile : sums) {
      for (float& sum : tile) sum = 0;
    }
  }

  // `end_key`: keys from there on were never written.
  __device__ __forceinline__ void attend(const uint4* queries, const uint8_t* page, int first,
                                         int end_key, int num_steps, int lane) {
    const uint8_t* values = page + kv_elements_bytes<kKind>(num_steps);
    const auto* scales =
        reinterpret_cast<const float*>(values + kv_elements_bytes<kKind>(num_steps));
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < num_steps) {
        const Operands keys = load_operands<kKind>(page, step, lane);
        const uint4 q = queries[step * 32 + lane];
        mma<kKind>(scores[0], q, keys.first[0], keys.first[1]);
        mma<kKind>(scores[1], q, keys.second[0], keys.second[1]);
      }
    }

    float weights[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = softmax[i].largest;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int slot = j / 2 * 8 + lane % 4 * 2 + j % 2;
        float& score = scores[j / 2][2 * i + j % 2];
        if constexpr (kHasKvScales<kKind>) score *= scales[slot];
        const bool is_seen = first + slot >= first_key[i] && first + slot <= last_key[i];
        score = is_seen ? score * kLog2E : -INFINITY;
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 2));
      const float base = largest == -INFINITY ? 0.0f : largest;
      const float factor = exp2f(softmax[i].largest - base);
      softmax[i] = {largest, softmax[i].total * factor};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float score = scores[j / 2][2 * i + j % 2];
        const float weight = exp2f(score - base);
        softmax[i].total += weight;
        weights[i][j] = weight;
        if constexpr (kHasKvScales<kKind>) {
          const int slot = j / 2 * 8 + lane % 4 * 2 + j % 2;
          // the scale of a value that is not seen may be NaN
          weights[i][j] = score == -INFINITY ? 0.0f : weight * scales[kPageSize + slot];
        }
      }
#pragma unroll
      for (auto& tile : sums) tile[2 * i] *= factor, tile[2 * i + 1] *= factor;
    }

    // what was never written may be NaN, and 0 times NaN is NaN
    const int left = end_key - first - lane % 4 * 2;
    const auto mask = [&](int slot) {
      return (slot < left ? 0x0000FFFFu : 0u) | (slot + 1 < left ? 0xFFFF0000u : 0u);
    };
    const uint32_t masks[] = {mask(0), mask(8)};
    const uint4 a = {
        pack<kKind>(weights[0][0], weights[0][1]), pack<kKind>(weights[1][0], weights[1][1]),
        pack<kKind>(weights[0][2], weights[0][3]), pack<kKind>(weights[1][2], weights[1][3])};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < num_steps) {
        const Operands v = load_operands<kKind>(values, step, lane);
        mma<kKind>(sums[2 * step], a, v.first[0] & masks[0], v.first[1] & masks[1]);
        mma<kKind>(sums[2 * step + 1], a, v.second[0] & masks[0], v.second[1] & masks[1]);
      }
    }
  }

  // To shared memory: of all queries, the softmax and, in rows of `stride`, the sums.
  __device__ __forceinline__ void store(Softmax* all, float* rows, int stride, int num_steps,
                                        int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = lane / 4 + 8 * i;
      softmax[i].total += __shfl_xor_sync(0xFFFFFFFF, softmax[i].total, 1);
      softmax[i].total += __shfl_xor_sync(0xFFFFFFFF, softmax[i].total, 2);
      if (lane % 4 == 0) all[query] = softmax[i];
#pragma unroll
      for (int tile = 0; tile < 2 * kSteps; ++tile) {
        if (tile < 2 * num_steps) {
          *reinterpret_cast<float2*>(rows + query * stride + tile * 8 + lane % 4 * 2) = {
              sums[tile][2 * i], sums[tile][2 * i + 1]};
        }
      }
    }
  }
};

// Shared memory of a block: its queries; what the splits before have summed; pages on their way
// and, in their place once they are read, what the warps have summed.
template <int kSteps>
struct SharedMemory {
  using P = Plan<kSteps>;
  uint8_t* base;
  int num_steps, head_bytes;
  int row_stride;  // of sums, in floats, such that a warp's lanes write to all banks

  __host__ __device__ SharedMemory(uint8_t* base, int num_steps, int head_bytes)
      : base(base),
        num_steps(num_steps),
        head_bytes(head_bytes),
        row_stride(num_steps * kStepDims + 8) {}
  __host__ __device__ int merged_offset() const { return num_steps * 32 * int{sizeof(uint4)}; }
  __host__ __device__ int pages_offset() const {
    return merged_offset() + kTileQueries * num_steps * kStepDims * 4;
  }
  __host__ __device__ int bytes() const {
    const int pages = P::kWarps * P::kStages * head_bytes;
    const int sums = P::kWarps * kTileQueries * (int{sizeof(Softmax)} + row_stride * 4);
    return pages_offset() + (pages > sums ? pages : sums);
  }

  __device__ uint4* queries() const { return reinterpret_cast<uint4*>(base); }
  __device__ float* merged(int query) const {
    return reinterpret_cast<float*>(base + merged_offset()) + query * num_steps * kStepDims;
  }
  __device__ uint8_t* page(int warp, int stage) const {
    return base + pages_offset() + (warp * P::kStages + stage) * head_bytes;
  }
  __device__ Softmax* softmax(int warp) const {
    return reinterpret_cast<Softmax*>(base + pages_offset()) + warp * kTileQueries;
  }
  __device__ float* sums(int warp) const {
    return reinterpret_cast<float*>(softmax(P::kWarps)) + warp * kTileQueries * row_stride;
  }
};

// The keys and values of one head that a tile sees.
struct Keys {
  const uint8_t* base;
  int64_t block_bytes;
  const int32_t* table;
  int first, last;  // key that any query sees

  __device__ int first_split() const { return first / kSplitKeys; }
  __device__ int last_split() const { return last / kSplitKeys; }
};

// A warp's share of a split. `meanwhile` is called when its first pages are on their way.
template <int kSteps, KvKind kKind, class Meanwhile>
__device__ __forceinline__ void attend_split(WarpTile<kSteps, kKind>& of_warp, const Keys& keys,
                                             int split, const SharedMemory<kSteps>& memory,
                                             const Meanwhile& meanwhile) {
  using P = Plan<kSteps>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = max(keys.first, split * kSplitKeys) / kPageSize;
  const int end_key = min(keys.last + 1, (split + 1) * kSplitKeys);
  const int end = (end_key + kPageSize - 1) / kPageSize;
  const int of_lane = split * kSplitPages + lane;
  const bool is_page = lane < kSplitPages && begin <= of_lane && of_lane < end;
  const int32_t blocks = is_page ? keys.table[of_lane] : 0;
  const auto request = [&](int page, int stage) {
    if (page < end) {
      const int64_t block = __shfl_sync(0xFFFFFFFF, blocks, page % kSplitPages);
      const uint8_t* from = keys.base + block * keys.block_bytes;
      uint8_t* to = memory.page(warp, stage);
      for (int i = lane * 16; i < memory.head_bytes; i += 512) cp_async_16(to + i, from + i, true);
    }
    cp_async_commit();
  };
  const int first = begin + (warp - begin % P::kWarps + P::kWarps) % P::kWarps;
  for (int i = 0; i < P::kStages; ++i) request(first + i * P::kWarps, i);
  meanwhile();
  of_warp.clear();
  int stage = 0;
  for (int page = first; page < end; page += P::kWarps) {
    cp_async_wait<P::kStages - 1>();
    __syncwarp();
    of_warp.attend(memory.queries(), memory.page(warp, stage), page * kPageSize, end_key,
                   memory.num_steps, lane);
    __syncwarp();
    request(page + P::kStages * P::kWarps, stage);
    stage = (stage + 1) % P::kStages;
  }
}

// What the warps have summed of a split goes to what the splits before have, by the threads of a
// query: `all` and, from `first_dim` on, the row `merged`.
template <int kSteps>
__device__ __forceinline__ void merge_split(const SharedMemory<kSteps>& memory, int query,
                                            int first_dim, Softmax& all, float* merged) {
  using P = Plan<kSteps>;
  Softmax of_split = {-INFINITY, 0.0f};
  Factors factors[P::kWarps];
  for (int w = 0; w < P::kWarps; ++w) factors[w] = merge(of_split, memory.softmax(w)[query]);
  const Factors both = merge(all, of_split);
  for (int dim = first_dim; dim < memory.num_steps * kStepDims; dim += P::kQueryThreads * 4) {
    float4 sums = {};
    for (int w = 0; w < P::kWarps; ++w) {
      const float* row = memory.sums(w) + query * memory.row_stride;
      sums = merge(sums, *reinterpret_cast<const float4*>(row + dim), factors[w]);
    }
    auto* before = reinterpret_cast<float4*>(merged + dim);
    *before = merge(*before, sums, both);
  }
}

// One block a multiprocessor is enough for ptxas, which else spills to make room for more.
template <int kSteps, KvKind kKind>
__global__ void __launch_bounds__(Plan<kSteps>::kThreads, 1) attend_kernel(const Params p) {
  using P = Plan<kSteps>;
  extern __shared__ __align__(16) uint8_t shared[];
  const AttentionTile tile = p.args.tiles[blockIdx.x];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int kv_head = static_cast<int>(blockIdx.y) / p.turns;
  const int first_head = static_cast<int>(blockIdx.y) * p.heads;
  const int D = p.shape.head_dim, num_steps = num_steps_of(D), width = num_steps * kStepDims;
  const SharedMemory<kSteps> memory(shared, num_steps, kv_head_bytes<kKind>(num_steps));
  const int first_place = p.rows.places[tile.first_row];
  const int last_place = p.rows.places[tile.first_row + tile.num_rows - 1];
  const Keys keys = {p.layer.base + int64_t{kv_head} * memory.head_bytes, p.layer.block_bytes,
                     p.rows.block_tables + p.rows.table_of[tile.first_row] * p.rows.table_stride,
                     first_seen(first_place, p.args.sliding_window), last_place};
  const int first_split = keys.first_split() + static_cast<int>(blockIdx.z);
  if (first_split > keys.last_split()) return;

  // the query and dimensions that a thread merges
  const int query = static_cast<int>(threadIdx.x) / P::kQueryThreads;
  const int first_dim = static_cast<int>(threadIdx.x) % P::kQueryThreads * 4;
  float* merged = memory.merged(query);
  Softmax all = {-INFINITY, 0.0f};
  for (int dim = first_dim; dim < width; dim += P::kQueryThreads * 4) {
    *reinterpret_cast<float4*>(merged + dim) = {};
  }

  WarpTile<kSteps, kKind> of_warp(p, tile, lane);
  for (int split = first_split; split <= keys.last_split(); split += static_cast<int>(gridDim.z)) {
    attend_split(of_warp, keys, split, memory, [&] {
      if (split > first_split) return;
      load_queries<P::kThreads>(p, tile, first_head, num_steps, memory.queries());
      __syncthreads();
    });
    __syncthreads();  // all pages are read
    of_warp.store(memory.softmax(warp), memory.sums(warp), memory.row_stride, num_steps, lane);
    __syncthreads();
    merge_split(memory, query, first_dim, all, merged);
    __syncthreads();  // all sums are read
  }

  if (query >= tile.num_rows * p.heads) return;
  const int row = tile.first_row + query / p.heads, head = first_head + query % p.heads;
  uint16_t* out = p.args.out + row * p.args.stride + head * D;
  // results of a query's splits stand in a ring, where its first one may be any
  const int64_t index = (int64_t{row} * p.shape.n_head + head) * p.num_splits;
  float* state = p.args.scratch + (index + first_split % p.num_splits) * state_floats(num_steps);
  for (int dim = first_dim; dim < width; dim += P::kQueryThreads * 4) {
    const float4 sums = *reinterpret_cast<const float4*>(merged + dim);
    if (p.num_splits == 1) {
      store_out(out, sums, all.total, dim, D);
    } else {
      *reinterpret_cast<float4*>(state + 4 + dim) = sums;
    }
  }
  if (p.num_splits > 1 && first_dim == 0) *reinterpret_cast<Softmax*>(state) = all;
}

constexpr int kMergeWarps = 4;

// A warp merges the splits of a query.
__global__ void __launch_bounds__(kMergeWarps * 32) merge_kernel(const Params p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t item = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / 32;
  const int64_t row = item / p.shape.n_head;
  const int head = static_cast<int>(item % p.shape.n_head);
  if (row >= p.rows.num_rows) return;
  const int D = p.shape.head_dim, num_steps = num_steps_of(D);
  const int place = p.rows.places[row];
  const int first_key = first_seen(place, p.args.sliding_window);
  const float* states = p.args.scratch + item * p.num_splits * state_floats(num_steps);
  for (int dim = lane * 4; dim < num_steps * kStepDims; dim += 128) {
    Softmax all = {-INFINITY, 0.0f};
    float4 sums = {};
#pragma unroll 4
    for (int split = first_key / kSplitKeys; split <= place / kSplitKeys; ++split) {
      const float* state = states + split % p.num_splits * state_floats(num_steps);
      const Factors f = merge(all, *reinterpret_cast<const Softmax*>(state));
      sums = merge(sums, *reinterpret_cast<const float4*>(state + 4 + dim), f);
    }
    store_out(p.args.out + row * p.args.stride + head * D, sums, all.total, dim, D);
  }
}

// Splits that the keys of a tile may touch.
int most_splits(int max_keys, int sliding_window) {
  const int splits = (max_keys + kSplitKeys - 1) / kSplitKeys;
  if (sliding_window == 0) return splits;
  const int keys = sliding_window + kTileQueries - 1;
  return std::min(splits, (keys + kSplitKeys - 2) / kSplitKeys + 1);
}

int64_t scratch_floats(const HeadShape& shape, int num_rows, int num_splits) {
  if (num_splits == 1) return 0;
  return int64_t{num_rows} * shape.n_head * num_splits * state_floats(num_steps_of(shape.head_dim));
}

template <int kSteps, KvKind kKind>
void launch(const Params& p, cudaStream_t stream) {
  const int num_steps = num_steps_of(p.shape.head_dim);
  const int head_bytes = kv_head_bytes<kKind>(num_steps);
  const int bytes = SharedMemory<kSteps>(nullptr, num_steps, head_bytes).bytes();
  const auto kernel = attend_kernel<kSteps, kKind>;
  allow_shared_memory(kernel, "attention_decode", bytes);
  const dim3 grid(p.args.num_tiles, p.shape.n_kv_head * p.turns, p.num_splits);
  kernel<<<grid, Plan<kSteps>::kThreads, bytes, stream>>>(p);
  check_launch("attention_decode");
}

template <KvKind kKind>
void launch(const Params& p, cudaStream_t stream) {
  const int num_steps = num_steps_of(p.shape.head_dim);
  if (num_steps <= 4) return launch<4, kKind>(p, stream);
  if (num_steps <= 8) return launch<8, kKind>(p, stream);
  return launch<16, kKind>(p, stream);
}

int turns_of(const HeadShape& shape) {
  const int group = shape.n_head / shape.n_kv_head;
  int turns = (group + kTileQueries - 1) / kTileQueries;
  while (group % turns) ++turns;
  return turns;
}

int heads_of(const HeadShape& shape) { return shape.n_head / shape.n_kv_head / turns_of(shape); }

}  // namespace

int attention_tile_rows(const HeadShape& shape) { return kTileQueries / heads_of(shape); }

int64_t attention_scratch_floats(const HeadShape& shape, int num_rows, int max_keys) {
  const int num_splits = most_splits(max_keys, 0);
  return std::min(kMostScratchFloats, scratch_floats(shape, num_rows, num_splits));
}

void attention_decode(const AttentionArgs& args, const HeadShape& shape, const StepRows& rows,
                      const KvLayer& layer, cudaStream_t stream) {
  check_heads(shape, "attention_decode");
  if (args.stride % 4 || args.stride < shape.n_head * shape.head_dim) {
    throw std::invalid_argument(
        "attention_decode: stride must be a multiple of 4 and hold the heads, " +
        std::to_string(shape.n_head * shape.head_dim) + ", got " + std::to_string(args.stride));
  }
  if (args.num_tiles == 0) return;
  int num_splits = most_splits(args.max_keys, args.sliding_window);
  if (scratch_floats(shape, rows.num_rows, num_splits) > kMostScratchFloats) num_splits = 1;
  const Params params = {args, shape, rows, layer, heads_of(shape), turns_of(shape), num_splits};
  with_kind(layer.kind, "attention_decode", [&](auto kind) { launch<kind()>(params, stream); });
  if (num_splits == 1) return;
  const int64_t warps = int64_t{rows.num_rows} * shape.n_head;
  merge_kernel<<<static_cast<unsigned>((warps + kMergeWarps - 1) / kMergeWarps), kMergeWarps * 32,
                 0, stream>>>(params);
  check_launch("attention_decode: merge");
}

}  // namespace leangpt::cuda
