// Attention of a few queries to the paged keys and values of their sequence, a chunk of 256 keys at
// a time. Which keys make a chunk depends on their positions alone, and chunks are merged in their
// order, so a query has the same bits whether it came in a prompt or alone, and on however many
// threads.
//
// A chunk: scores s_j = q . k_j (16 keys in the lanes of a Vec), m = max s_j, p_j = exp(s_j - m), l
// = sum p_j, o = sum p_j v_j. Reference: Dao, 2023, https://arxiv.org/abs/2307.08691

// Keys and values lie as the weights of a product do (see Matrix), so one product serves all: 64
// bytes are 16 keys with 1 of their elements (bf16: 2, int8: 4), or 16 elements of 1 value (bf16:
// of 2 values, int8: of 4).

constexpr int kUnroll = 4;
constexpr int side_by_side(int sums) {  // pages or Vecs of a value that are summed at a time
  return kAttentionSums / sums < 1         ? 1
         : kAttentionSums / sums > kUnroll ? kUnroll
                                           : kAttentionSums / sums;
}

static inline const uint8_t* page_at(const AttentionTile& tile, int page) {
  return tile.pages.base + tile.pages.block_table[page] * tile.pages.block_bytes;
}

// Behind 16 int8 keys or values of `width` elements: their scales.
static inline float* int8_scales(uint8_t* rows, int64_t width) {
  return reinterpret_cast<float*>(rows + round_up(width, 4) * kLanes);
}
static inline const float* int8_scales(const uint8_t* rows, int64_t width) {
  return reinterpret_cast<const float*>(rows + round_up(width, 4) * kLanes);
}

static inline void store_elements(float* p, Vec v) { store(p, v); }
static inline void store_elements(uint16_t* p, Vec v) { store_bf16(p, v); }

// A cache of float32 or bf16, as some queries see it.
template <class Format, int kQueries>
struct FloatCache {
  using Element = typename Format::Element;
  static constexpr int kTogether = side_by_side(kQueries);
  static constexpr int count(const AttentionTile&) { return kQueries; }
  alignas(64) Element queries[kQueries][kMaxHeadDim];
  alignas(64) Element weights[kQueries][kChunkKeys];

  // `x` has zeros from D on, up to a multiple of 16.
  void set_query(int q, const float* x, int width) {
    for (int i = 0; i < width; i += kLanes) store_elements(queries[q] + i, load(x + i));
  }

  template <int kPages>
  void score(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) const {
    Vec sums[kQueries][kPages];
    const uint8_t* keys[kPages];
    for (int p = 0; p < kPages; ++p) {
      keys[p] = page_at(tile, page + p);
      for (int q = 0; q < kQueries; ++q) sums[q][p] = zero();
    }
    for (int d = 0; d < tile.head_dim; d += Format::kInputs) {
      for (int p = 0; p < kPages; ++p) {
        const auto key = Format::load_weights(keys[p] + d / Format::kInputs * 64);
        for (int q = 0; q < kQueries; ++q) {
          sums[q][p] = Format::dot(sums[q][p], key, queries[q] + d);
        }
      }
    }
    const int column = page * kLanes % kChunkKeys;
    for (int q = 0; q < kQueries; ++q) {
      for (int p = 0; p < kPages; ++p) store(scores[q] + column + p * kLanes, sums[q][p]);
    }
  }

  // Weights of the 16 keys of each page; those of keys that a query does not see are 0.
  void set_weights(const AttentionTile&, int q, int first_page, int last_page, const float* x) {
    for (int page = first_page; page < last_page; ++page) {
      const int column = page * kLanes % kChunkKeys;
      store_elements(weights[q] + column, load(x + column));
    }
  }

  template <int kVecs>
  void sum(const AttentionTile& tile, int first_key, int last_key, int vec,
           float (*out)[kMaxHeadDim]) const {
    const int64_t step_bytes = round_up(tile.head_dim, kLanes) / kLanes * 64;
    Vec sums[kQueries][kVecs];
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVecs; ++v) sums[q][v] = zero();
    }
    for (int key = first_key / Format::kInputs * Format::kInputs; key < last_key;
         key += Format::kInputs) {
      const uint8_t* values = page_at(tile, key / kLanes) + tile.pages.value_offset +
                              key % kLanes / Format::kInputs * step_bytes + vec * 64;
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
};

// The weights of a query's keys, each times the scale of its int8 value.
static void scale_weights(const AttentionTile& tile, int q, int first_page, int last_page,
                          const float* x, float* scaled) {
  for (int page = first_page; page < last_page; ++page) {
    const int column = page * kLanes % kChunkKeys, key = page * kLanes;
    const Vec scale = load(int8_scales(page_at(tile, page) + tile.pages.value_offset,
                                       round_up(tile.head_dim, kLanes)));
    // the scale of a value that is not seen may be NaN
    store(scaled + column, keep_lanes(load(x + column) * scale, tile.first_key[q] - key,
                                      tile.last_key[q] - key, 0.0f));
  }
}

// A cache of int8: each key and each value of a head has a scale. What they are multiplied with,
// queries and weights, is split into two digits of 8 bits; a value's scale goes into its weight.
template <int kQueries>
struct Int8Cache {
  static constexpr int kDigits = 2, kInputs = 4;
  static constexpr int kTogether = side_by_side(kQueries * kDigits);
  static constexpr int count(const AttentionTile&) { return kQueries; }
  alignas(64) int8_t queries[kQueries][kDigits][kMaxHeadDim];
  alignas(64) int8_t weights[kQueries][kDigits][kChunkKeys];
  float query_scales[kQueries], weight_scales[kQueries];
  int32_t query_offsets[kQueries][kDigits], weight_offsets[kQueries][kDigits];

  void set_query(int q, const float* x, int width) {
    query_scales[q] =
        split_digits<kDigits>(x, width, width, queries[q][0], kMaxHeadDim, query_offsets[q]);
    for (int d = 0; d < kDigits; ++d) query_offsets[q][d] *= -128;
  }

  static Vec combine(IVec high, IVec low) {
    return fma(to_float(high), broadcast(256.0f), to_float(low));
  }

  template <int kPages>
  void score(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) const {
    IVec sums[kQueries][kDigits][kPages];
    const uint8_t* keys[kPages];
    for (int p = 0; p < kPages; ++p) {
      keys[p] = page_at(tile, page + p);
      for (int q = 0; q < kQueries; ++q) {
        for (int d = 0; d < kDigits; ++d) sums[q][d][p] = broadcast_i32(query_offsets[q][d]);
      }
    }
    for (int i = 0; i < tile.head_dim; i += kInputs) {
      for (int p = 0; p < kPages; ++p) {
        const Int8Weights key = load_int8_weights(keys[p] + i / kInputs * 64);
        for (int q = 0; q < kQueries; ++q) {
          for (int d = 0; d < kDigits; ++d) {
            sums[q][d][p] = dot_int8(sums[q][d][p], key, queries[q][d] + i);
          }
        }
      }
    }
    const int column = page * kLanes % kChunkKeys;
    for (int p = 0; p < kPages; ++p) {
      const Vec scale = load(int8_scales(keys[p], tile.head_dim));
      for (int q = 0; q < kQueries; ++q) {
        store(scores[q] + column + p * kLanes,
              combine(sums[q][0][p], sums[q][1][p]) * (scale * broadcast(query_scales[q])));
      }
    }
  }

  void set_weights(const AttentionTile& tile, int q, int first_page, int last_page,
                   const float* x) {
    alignas(64) float scaled[kChunkKeys];
    scale_weights(tile, q, first_page, last_page, x, scaled);
    const int first = first_page * kLanes % kChunkKeys, keys = (last_page - first_page) * kLanes;
    weight_scales[q] = split_digits<kDigits>(scaled + first, keys, keys, weights[q][0] + first,
                                             kChunkKeys, weight_offsets[q]);
    for (int d = 0; d < kDigits; ++d) weight_offsets[q][d] *= -128;
  }

  template <int kVecs>
  void sum(const AttentionTile& tile, int first_key, int last_key, int vec,
           float (*out)[kMaxHeadDim]) const {
    const int64_t step_bytes = round_up(tile.head_dim, kLanes) / kLanes * 64;
    IVec sums[kQueries][kDigits][kVecs];
    for (int q = 0; q < kQueries; ++q) {
      for (int d = 0; d < kDigits; ++d) {
        for (int v = 0; v < kVecs; ++v) sums[q][d][v] = broadcast_i32(weight_offsets[q][d]);
      }
    }
    for (int key = first_key / kInputs * kInputs; key < last_key; key += kInputs) {
      const uint8_t* values = page_at(tile, key / kLanes) + tile.pages.value_offset +
                              key % kLanes / kInputs * step_bytes + vec * 64;
      Int8Weights value[kVecs];
      for (int v = 0; v < kVecs; ++v) value[v] = load_int8_weights(values + v * 64);
      for (int q = 0; q < kQueries; ++q) {
        for (int d = 0; d < kDigits; ++d) {
          const int8_t* weight = weights[q][d] + key % kChunkKeys;
          for (int v = 0; v < kVecs; ++v) {
            sums[q][d][v] = dot_int8(sums[q][d][v], value[v], weight);
          }
        }
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVecs; ++v) {
        store(out[q] + (vec + v) * kLanes,
              combine(sums[q][0][v], sums[q][1][v]) * broadcast(weight_scales[q]));
      }
    }
  }
};

// The same cache multiplied as floats, which is exact in keys and values: quicker where no
// instruction adds up products of bytes, since some queries share what is widened.
template <int kQueries>
struct WidenedInt8Cache : FloatCache<WidenedInt8Format, kQueries> {
  using Base = FloatCache<WidenedInt8Format, kQueries>;

  template <int kPages>
  void score(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) const {
    Base::template score<kPages>(tile, page, scores);
    for (int p = 0; p < kPages; ++p) {
      const Vec scale = load(int8_scales(page_at(tile, page + p), tile.head_dim));
      for (int q = 0; q < kQueries; ++q) {
        float* at = scores[q] + (page + p) * kLanes % kChunkKeys;
        store(at, load(at) * scale);
      }
    }
  }

  void set_weights(const AttentionTile& tile, int q, int first_page, int last_page,
                   const float* x) {
    alignas(64) float scaled[kChunkKeys];
    scale_weights(tile, q, first_page, last_page, x, scaled);
    Base::set_weights(tile, q, first_page, last_page, scaled);
  }
};

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

template <class Cache, int kQueries>
static void attend_queries(const AttentionTile& tile, int chunk, float* const* states) {
  const int chunk_first = chunk * kChunkKeys, chunk_last = chunk_first + kChunkKeys;
  const int count = Cache::count(tile);
  int first[kQueries], last[kQueries], begin = chunk_last, end = chunk_first;
  for (int q = 0; q < count; ++q) {
    first[q] = tile.first_key[q] > chunk_first ? tile.first_key[q] : chunk_first;
    last[q] = tile.last_key[q] < chunk_last ? tile.last_key[q] : chunk_last;
    if (first[q] >= last[q]) continue;  // the query sees nothing of this chunk
    begin = first[q] < begin ? first[q] : begin;
    end = last[q] > end ? last[q] : end;
  }
  if (begin >= end) return;

  Cache cache;
  const int width = static_cast<int>(round_up(tile.head_dim, kLanes));
  for (int q = 0; q < count; ++q) {
    alignas(64) float query[kMaxHeadDim];
    for (int i = 0; i < width; i += kLanes) {
      store(query + i, keep_lanes(load(tile.queries[q] + i), 0, tile.head_dim - i, 0.0f));
    }
    cache.set_query(q, query, width);
  }

  alignas(64) float scores[kQueries][kChunkKeys];
  const int first_page = begin / kLanes, last_page = (end + kLanes - 1) / kLanes;
  for (int page = first_page; page < last_page; page += Cache::kTogether) {
    const int left = last_page - page;
    with_constant<Cache::kTogether>(left < Cache::kTogether ? left : Cache::kTogether, [&](auto P) {
      cache.template score<decltype(P)::value>(tile, page, scores);
    });
  }

  float tops[kQueries], totals[kQueries];
  for (int q = 0; q < count; ++q) {
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
      store(scores[q] + key % kChunkKeys, weight);
    }
    cache.set_weights(tile, q, first_page, last_page, scores[q]);
    totals[q] = sees_nothing ? 0.0f : reduce_add(total);
  }

  alignas(64) float sums[kQueries][kMaxHeadDim];
  for (int vec = 0; vec < width / kLanes; vec += Cache::kTogether) {
    const int left = width / kLanes - vec;
    with_constant<Cache::kTogether>(left < Cache::kTogether ? left : Cache::kTogether, [&](auto V) {
      cache.template sum<decltype(V)::value>(tile, begin, end, vec, sums);
    });
  }
  alignas(64) float partial[kLanes + kMaxHeadDim];
  for (int q = 0; q < count; ++q) {
    if (first[q] >= last[q]) continue;
    partial[0] = tops[q];
    partial[1] = totals[q];
    std::memcpy(partial + kLanes, sums[q], width * sizeof(float));
    merge_states(states[q], partial, tile.head_dim);
  }
}

// On those ISAs that have tiles: to a bf16 cache.
template <class Format>
static void attend_in_tiles(const AttentionTile& tile, int chunk, float* const* states);

static void attend_chunk(const AttentionTile& tile, int chunk, float* const* states) {
  if constexpr (kHasTiles) {
    if (tile.pages.kind == KvKind::kBf16) return attend_in_tiles<Bf16Format>(tile, chunk, states);
  }
  with_constant<kMaxQueries>(tile.num_queries, [&](auto Q) {
    constexpr int kQueries = decltype(Q)::value;
    switch (tile.pages.kind) {
      case KvKind::kFp32:
        return attend_queries<FloatCache<Fp32Format, kQueries>, kQueries>(tile, chunk, states);
      case KvKind::kBf16:
        return attend_queries<FloatCache<Bf16Format, kQueries>, kQueries>(tile, chunk, states);
      case KvKind::kInt8:
        if constexpr (kWidensInt8Cache) {
          return attend_queries<WidenedInt8Cache<kQueries>, kQueries>(tile, chunk, states);
        } else {
          return attend_queries<Int8Cache<kQueries>, kQueries>(tile, chunk, states);
        }
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
  for (int d = 0; d < width; d += kLanes) {
    if constexpr (kInputs == 2) {
      store_in_pairs(pairs + d * 2, elements + d, slot % 2);
    } else {
      store(pairs + d, load(elements + d));
    }
  }
  if (kInputs == 2 && slot % 2 == 0 && is_last) {
    for (int d = 0; d < width; ++d) pairs[d * kInputs + 1] = 0;
  }
}

// The scale of a row as int8, and its bytes: the integer plus 128.
static float to_bytes(const float* x, int head_dim, uint8_t* bytes) {
  const int width = static_cast<int>(round_up(head_dim, kLanes));
  alignas(64) float padded[kMaxHeadDim];
  std::memcpy(padded, x, head_dim * sizeof(float));
  for (int d = head_dim; d < width; ++d) padded[d] = 0;
  int32_t sum;
  const float scale =
      split_digits<1>(padded, width, width, reinterpret_cast<int8_t*>(bytes), kMaxHeadDim, &sum);
  for (int d = 0; d < width; ++d) bytes[d] ^= 0x80;
  return scale;
}

static void append_int8(const float* key, const float* value, int head_dim, uint8_t* keys,
                        uint8_t* values, int slot) {
  const int width = static_cast<int>(round_up(head_dim, kLanes));
  uint8_t bytes[kMaxHeadDim];
  int8_scales(keys, head_dim)[slot] = to_bytes(key, head_dim, bytes);
  for (int d = 0; d < head_dim; d += 4) {
    std::memcpy(keys + d * kLanes + slot * 4, bytes + d, 4);
  }
  int8_scales(values, width)[slot] = to_bytes(value, head_dim, bytes);
  uint8_t* four = values + slot / 4 * 4 * width;
  for (int d = 0; d < width; ++d) four[d * 4 + slot % 4] = bytes[d];
}

static void append_kv(const float* key, const float* value, int head_dim, KvKind kind,
                      uint8_t* page, int64_t value_offset, int slot, bool is_last) {
  uint8_t* values = page + value_offset;
  switch (kind) {
    case KvKind::kFp32:
      return append_elements<1>(key, value, head_dim, reinterpret_cast<float*>(page),
                                reinterpret_cast<float*>(values), slot, is_last);
    case KvKind::kBf16:
      return append_elements<2>(key, value, head_dim, reinterpret_cast<uint16_t*>(page),
                                reinterpret_cast<uint16_t*>(values), slot, is_last);
    case KvKind::kInt8:
      return append_int8(key, value, head_dim, page, values, slot);
  }
}
