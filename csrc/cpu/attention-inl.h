// Attention of a few queries to the paged keys and values of their sequence, a chunk of 256 keys at
// a time. Which keys make a chunk depends on their positions alone, and chunks are merged in their
// order, so a query has the same bits whether it came in a prompt or alone, and on however many
// threads.
//
// A chunk: scores s_j = q . k_j (16 keys in the lanes of a Vec), m = max s_j, p_j = exp(s_j - m), l
// = sum p_j, o = sum p_j v_j. Reference: Dao, 2023, https://arxiv.org/abs/2307.08691

template <KvKind kKind>
static inline Vec load_kv(const uint8_t* p, int64_t index) {
  if constexpr (kKind == KvKind::kFp32) {
    return load(reinterpret_cast<const float*>(p) + index);
  } else {
    return load_bf16(reinterpret_cast<const uint16_t*>(p) + index);
  }
}

constexpr int kUnroll = 4;
constexpr int side_by_side(int queries) {  // pages or Vecs of a value that are summed at a time
  return kAttentionSums / queries < 1         ? 1
         : kAttentionSums / queries > kUnroll ? kUnroll
                                              : kAttentionSums / queries;
}

template <KvKind kKind, int kQueries, int kPages>
static void score_pages(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) {
  Vec sums[kQueries][kPages];
  const uint8_t* keys[kPages];
  for (int p = 0; p < kPages; ++p) {
    keys[p] = tile.pages.base + tile.pages.block_table[page + p] * tile.pages.block_bytes;
    for (int q = 0; q < kQueries; ++q) sums[q][p] = zero();
  }
  for (int d = 0; d < tile.head_dim; ++d) {
    for (int p = 0; p < kPages; ++p) {
      const Vec key = load_kv<kKind>(keys[p], d * kLanes);
      for (int q = 0; q < kQueries; ++q) {
        sums[q][p] = fma(key, broadcast(tile.queries[q][d]), sums[q][p]);
      }
    }
  }
  const int column = page * kLanes % kChunkKeys;
  for (int q = 0; q < kQueries; ++q) {
    for (int p = 0; p < kPages; ++p) store(scores[q] + column + p * kLanes, sums[q][p]);
  }
}

template <KvKind kKind, int kQueries, int kVecs>
static void sum_values(const AttentionTile& tile, int first_key, int last_key, int column,
                       const float (*weights)[kChunkKeys], float (*out)[kMaxHeadDim]) {
  const int64_t width = round_up(tile.head_dim, kLanes);
  Vec sums[kQueries][kVecs];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVecs; ++v) sums[q][v] = zero();
  }
  for (int key = first_key; key < last_key; ++key) {
    const uint8_t* values = tile.pages.base +
                            tile.pages.block_table[key / kLanes] * tile.pages.block_bytes +
                            tile.pages.value_offset;
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      value[v] = load_kv<kKind>(values, key % kLanes * width + column + v * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      const Vec weight = broadcast(weights[q][key % kChunkKeys]);
      for (int v = 0; v < kVecs; ++v) sums[q][v] = fma(weight, value[v], sums[q][v]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVecs; ++v) store(out[q] + column + v * kLanes, sums[q][v]);
  }
}

// An empty state has the weight sum 0.
static void merge_states(float* into, const float* from, int head_dim) {
  if (from[1] == 0.0f) return;
  const int64_t floats = attention_state_floats(head_dim);
  if (into[1] == 0.0f) {
    std::memcpy(into, from, floats * sizeof(float));
    return;
  }
  const float top = into[0] > from[0] ? into[0] : from[0];
  float factors[kLanes];
  store(factors, exp(keep_lanes(broadcast(into[0] - top), 0, 1, from[0] - top)));
  for (int64_t i = kLanes; i < floats; i += kLanes) {
    store(into + i,
          fma(load(from + i), broadcast(factors[1]), load(into + i) * broadcast(factors[0])));
  }
  into[1] = into[1] * factors[0] + from[1] * factors[1];
  into[0] = top;
}

template <KvKind kKind, int kQueries>
static void attend_queries(const AttentionTile& tile, int chunk, float* const* states) {
  const int chunk_first = chunk * kChunkKeys, chunk_last = chunk_first + kChunkKeys;
  int first[kQueries], last[kQueries], begin = chunk_last, end = chunk_first;
  for (int q = 0; q < kQueries; ++q) {
    first[q] = tile.first_key[q] > chunk_first ? tile.first_key[q] : chunk_first;
    last[q] = tile.last_key[q] < chunk_last ? tile.last_key[q] : chunk_last;
    if (first[q] >= last[q]) continue;  // the query sees nothing of this chunk
    begin = first[q] < begin ? first[q] : begin;
    end = last[q] > end ? last[q] : end;
  }
  if (begin >= end) return;

  alignas(64) float scores[kQueries][kChunkKeys];
  const int first_page = begin / kLanes, last_page = (end + kLanes - 1) / kLanes;
  constexpr int kPages = side_by_side(kQueries);
  for (int page = first_page; page < last_page; page += kPages) {
    with_constant<kPages>(last_page - page < kPages ? last_page - page : kPages, [&](auto P) {
      score_pages<kKind, kQueries, decltype(P)::value>(tile, page, scores);
    });
  }

  alignas(64) float partial[kLanes + kMaxHeadDim];
  float tops[kQueries], totals[kQueries];
  for (int q = 0; q < kQueries; ++q) {
    totals[q] = 0;
    tops[q] = 0;
    const bool sees_nothing = first[q] >= last[q];
    Vec largest = broadcast(-3.4e38f), total = zero();
    for (int page = first_page; page < last_page && !sees_nothing; ++page) {
      const int key = page * kLanes;
      const Vec s = load(scores[q] + key % kChunkKeys);
      largest = max(largest, keep_lanes(s, first[q] - key, last[q] - key, -3.4e38f));
    }
    tops[q] = reduce_max(largest);
    for (int page = first_page; page < last_page; ++page) {
      const int key = page * kLanes;
      float* at = scores[q] + key % kChunkKeys;
      Vec weight = exp(load(at) - broadcast(tops[q]));
      weight = keep_lanes(weight, first[q] - key, last[q] - key, 0.0f);
      total = total + weight;
      store(at, weight);
    }
    totals[q] = sees_nothing ? 0.0f : reduce_add(total);
  }

  alignas(64) float sums[kQueries][kMaxHeadDim];
  const int width = static_cast<int>(round_up(tile.head_dim, kLanes));
  constexpr int kVecs = side_by_side(kQueries);
  for (int column = 0; column < width; column += kVecs * kLanes) {
    const int left = (width - column) / kLanes;
    with_constant<kVecs>(left < kVecs ? left : kVecs, [&](auto V) {
      sum_values<kKind, kQueries, decltype(V)::value>(tile, begin, end, column, scores, sums);
    });
  }
  for (int q = 0; q < kQueries; ++q) {
    if (first[q] >= last[q]) continue;
    partial[0] = tops[q];
    partial[1] = totals[q];
    std::memcpy(partial + kLanes, sums[q], width * sizeof(float));
    merge_states(states[q], partial, tile.head_dim);
  }
}

static void attend_chunk(const AttentionTile& tile, int chunk, float* const* states) {
  with_constant<kMaxQueries>(tile.num_queries, [&](auto Q) {
    if (tile.pages.kind == KvKind::kFp32) {
      attend_queries<KvKind::kFp32, decltype(Q)::value>(tile, chunk, states);
    } else {
      attend_queries<KvKind::kBf16, decltype(Q)::value>(tile, chunk, states);
    }
  });
}

static void finish_state(const float* state, int head_dim, float* out) {
  const Vec inverse = broadcast(1.0f / state[1]);
  for (int i = 0; i < head_dim; i += kLanes) {
    const Vec value = load(state + kLanes + i) * inverse;
    if (head_dim - i >= kLanes) {
      store(out + i, value);
    } else {
      store_first(out + i, value, head_dim - i);
    }
  }
}

static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void append_kv(const float* key, const float* value, int head_dim, KvKind kind,
                      uint8_t* page, int64_t value_offset, int slot) {
  const int64_t width = round_up(head_dim, kLanes);
  if (kind == KvKind::kFp32) {
    auto* keys = reinterpret_cast<float*>(page);
    auto* values = reinterpret_cast<float*>(page + value_offset) + slot * width;
    for (int d = 0; d < head_dim; ++d) keys[d * kLanes + slot] = key[d];
    for (int d = 0; d < width; ++d) values[d] = d < head_dim ? value[d] : 0.0f;
  } else {
    auto* keys = reinterpret_cast<uint16_t*>(page);
    auto* values = reinterpret_cast<uint16_t*>(page + value_offset) + slot * width;
    for (int d = 0; d < head_dim; ++d) keys[d * kLanes + slot] = to_bf16(key[d]);
    for (int d = 0; d < width; ++d) values[d] = d < head_dim ? to_bf16(value[d]) : 0;
  }
}
