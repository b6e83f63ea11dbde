// Attention of a few queries to the paged keys and values of their sequence, a chunk of 256 keys at
// a time. Which keys make a chunk depends on their positions alone, and chunks are merged in their
// order, so a query has the same bits whether it came in a prompt or alone, and on however many
// threads.
//
// A chunk: scores s_j = q . k_j (16 keys in the lanes of a Vec), m = max s_j, p_j = exp(s_j - m), l
// = sum p_j, o = sum p_j v_j. Reference: Dao, 2023, https://arxiv.org/abs/2307.08691

// Keys and values lie as the weights of a product do (see Matrix), so one product serves all: 64
// bytes are 16 keys with 1 of their elements (bf16: 2), or 16 elements of 1 value (bf16: 2 values).

constexpr int kUnroll = 4;
constexpr int side_by_side(int queries) {  // pages or Vecs of a value that are summed at a time
  return kAttentionSums / queries < 1         ? 1
         : kAttentionSums / queries > kUnroll ? kUnroll
                                              : kAttentionSums / queries;
}

template <class Format, int kQueries, int kPages>
static void score_pages(const AttentionTile& tile, int page,
                        const typename Format::Element (*queries)[kMaxHeadDim],
                        float (*scores)[kChunkKeys]) {
  Vec sums[kQueries][kPages];
  const uint8_t* keys[kPages];
  for (int p = 0; p < kPages; ++p) {
    keys[p] = tile.pages.base + tile.pages.block_table[page + p] * tile.pages.block_bytes;
    for (int q = 0; q < kQueries; ++q) sums[q][p] = zero();
  }
  for (int d = 0; d < tile.head_dim; d += Format::kInputs) {
    for (int p = 0; p < kPages; ++p) {
      const auto key = Format::load_weights(keys[p] + d / Format::kInputs * 64);
      for (int q = 0; q < kQueries; ++q) sums[q][p] = Format::dot(sums[q][p], key, queries[q] + d);
    }
  }
  const int column = page * kLanes % kChunkKeys;
  for (int q = 0; q < kQueries; ++q) {
    for (int p = 0; p < kPages; ++p) store(scores[q] + column + p * kLanes, sums[q][p]);
  }
}

// Weights of keys that a query does not see are 0.
template <class Format, int kQueries, int kVecs>
static void sum_values(const AttentionTile& tile, int first_key, int last_key, int vec,
                       const typename Format::Element (*weights)[kChunkKeys],
                       float (*out)[kMaxHeadDim]) {
  const int64_t step_bytes = round_up(tile.head_dim, kLanes) / kLanes * 64;
  Vec sums[kQueries][kVecs];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVecs; ++v) sums[q][v] = zero();
  }
  for (int key = first_key / Format::kInputs * Format::kInputs; key < last_key;
       key += Format::kInputs) {
    const uint8_t* values =
        tile.pages.base + tile.pages.block_table[key / kLanes] * tile.pages.block_bytes +
        tile.pages.value_offset + key % kLanes / Format::kInputs * step_bytes + vec * 64;
    typename Format::Weights value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = Format::load_weights(values + v * 64);
    for (int q = 0; q < kQueries; ++q) {
      const auto* weight = weights[q] + key % kChunkKeys;
      for (int v = 0; v < kVecs; ++v) sums[q][v] = Format::dot(sums[q][v], value[v], weight);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVecs; ++v) store(out[q] + (vec + v) * kLanes, sums[q][v]);
  }
}

static inline void store_elements(float* p, Vec v) { store(p, v); }
static inline void store_elements(uint16_t* p, Vec v) { store_bf16(p, v); }

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

template <class Format, int kQueries>
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

  using Element = typename Format::Element;
  alignas(64) Element queries[kQueries][kMaxHeadDim];
  const int width = static_cast<int>(round_up(tile.head_dim, kLanes));
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < width; i += kLanes) {
      store_elements(queries[q] + i,
                     keep_lanes(load(tile.queries[q] + i), 0, tile.head_dim - i, 0.0f));
    }
  }

  alignas(64) float scores[kQueries][kChunkKeys];
  const int first_page = begin / kLanes, last_page = (end + kLanes - 1) / kLanes;
  constexpr int kPages = side_by_side(kQueries);
  for (int page = first_page; page < last_page; page += kPages) {
    with_constant<kPages>(last_page - page < kPages ? last_page - page : kPages, [&](auto P) {
      score_pages<Format, kQueries, decltype(P)::value>(tile, page, queries, scores);
    });
  }

  alignas(64) float partial[kLanes + kMaxHeadDim];
  alignas(64) Element weights[kQueries][kChunkKeys];
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
      Vec weight = exp(load(scores[q] + key % kChunkKeys) - broadcast(tops[q]));
      weight = keep_lanes(weight, first[q] - key, last[q] - key, 0.0f);
      total = total + weight;
      store_elements(weights[q] + key % kChunkKeys, weight);
    }
    totals[q] = sees_nothing ? 0.0f : reduce_add(total);
  }

  alignas(64) float sums[kQueries][kMaxHeadDim];
  constexpr int kVecs = side_by_side(kQueries);
  for (int vec = 0; vec < width / kLanes; vec += kVecs) {
    const int left = width / kLanes - vec;
    with_constant<kVecs>(left < kVecs ? left : kVecs, [&](auto V) {
      sum_values<Format, kQueries, decltype(V)::value>(tile, begin, end, vec, weights, sums);
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
      attend_queries<Fp32Format, decltype(Q)::value>(tile, chunk, states);
    } else {
      attend_queries<Bf16Format, decltype(Q)::value>(tile, chunk, states);
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

// Element (d, slot) of the keys and (slot, d) of the values of a page. Of a pair of values the
// second is 0 until it comes: its weight is 0, but 0 times a stale NaN would be NaN.
template <int kInputs, class Element>
static void append_elements(const float* key, const float* value, int head_dim, Element* keys,
                            Element* values, int slot, bool is_last) {
  const int width = static_cast<int>(round_up(head_dim, kLanes));
  alignas(64) Element elements[kMaxHeadDim];
  const auto convert = [&](const float* x) {
    alignas(64) float padded[kMaxHeadDim];
    std::memcpy(padded, x, head_dim * sizeof(float));
    for (int d = head_dim; d < width; ++d) padded[d] = 0;
    for (int d = 0; d < width; d += kLanes) store_elements(elements + d, load(padded + d));
  };
  convert(key);
  for (int d = 0; d < head_dim; d += kInputs) {
    std::memcpy(keys + d * kLanes + slot * kInputs, elements + d, kInputs * sizeof(Element));
  }
  convert(value);
  Element* pairs = values + slot / kInputs * kInputs * width;
  for (int d = 0; d < width; ++d) pairs[d * kInputs + slot % kInputs] = elements[d];
  if (kInputs == 2 && slot % 2 == 0 && is_last) {
    for (int d = 0; d < width; ++d) pairs[d * kInputs + 1] = 0;
  }
}

static void append_kv(const float* key, const float* value, int head_dim, KvKind kind,
                      uint8_t* page, int64_t value_offset, int slot, bool is_last) {
  uint8_t* values = page + value_offset;
  if (kind == KvKind::kFp32) {
    append_elements<1>(key, value, head_dim, reinterpret_cast<float*>(page),
                       reinterpret_cast<float*>(values), slot, is_last);
  } else {
    append_elements<2>(key, value, head_dim, reinterpret_cast<uint16_t*>(page),
                       reinterpret_cast<uint16_t*>(values), slot, is_last);
  }
}
