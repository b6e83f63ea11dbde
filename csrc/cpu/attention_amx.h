// Attention of some queries to a bf16 cache in tiles of AMX: a page of keys is a tile of columns
// for every 32 of their elements, a page of values one for every 16 of theirs.

template <int kQueries>
struct TiledCache : FloatCache<Bf16Format, kQueries> {
  using Base = FloatCache<Bf16Format, kQueries>;
  static constexpr int kTogether = 4, kPageSteps = kLanes / 2;
  static int count(const AttentionTile& tile) { return tile.num_queries; }

  // Tiles 0 to 3 are sums, 4 and 6 queries and keys, 5 and 7 weights and values.
  static void configure(const AttentionTile& tile, int key_steps = kTileSteps) {
    const int n = tile.num_queries;
    configure_tiles({n, n, n, n, n, n, key_steps, kPageSteps},
                    {64, 64, 64, 64, key_steps * 4, kPageSteps * 4, 64, 64});
  }

  template <int kPages>
  void score(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) const {
    constexpr int64_t kRowBytes = kChunkKeys * sizeof(float);
    auto* sums = reinterpret_cast<uint8_t*>(scores[0] + page * kLanes % kChunkKeys);
    const uint8_t* keys[kPages];
    for (int p = 0; p < kPages; ++p) keys[p] = page_at(tile, page + p);
    const auto multiply = [&](int step) {
      load_tile<4>(this->queries[0] + step * 2, sizeof this->queries[0]);
      each<kPages>([&](auto p) {
        load_tile<6>(keys[p.value] + step * 64, 64);
        Bf16Tiles::multiply<p.value, 4, 6>();
      });
    };
    const auto store_sums = [&] {
      each<kPages>([&](auto p) { store_tile<p.value>(sums + p.value * 64, kRowBytes); });
    };
    const int steps = (tile.head_dim + 1) / 2, whole = steps / kTileSteps * kTileSteps;
    each<kPages>([&](auto p) { clear_tile<p.value>(); });
    for (int step = 0; step < whole; step += kTileSteps) multiply(step);
    store_sums();
    if (whole == steps) return;
    configure(tile, steps - whole);
    each<kPages>([&](auto p) { load_tile<p.value>(sums + p.value * 64, kRowBytes); });
    multiply(whole);
    store_sums();
    configure(tile);
  }

  template <int kVecs>
  void sum(const AttentionTile& tile, int first_key, int last_key, int vec,
           float (*out)[kMaxHeadDim]) const {
    constexpr int64_t kRowBytes = kMaxHeadDim * sizeof(float);
    const int64_t step_bytes = round_up(tile.head_dim, kLanes) / kLanes * 64;
    auto* sums = reinterpret_cast<uint8_t*>(out[0] + vec * kLanes);
    alignas(64) uint8_t seen[kPageSteps][kVecs * 64];
    each<kVecs>([&](auto v) { clear_tile<v.value>(); });
    for (int key = first_key / kLanes * kLanes; key < last_key; key += kLanes) {
      const uint8_t* values = page_at(tile, key / kLanes) + tile.pages.value_offset + vec * 64;
      int64_t stride = step_bytes;
      if (key < first_key || key + kLanes > last_key) {  // what no query sees may be NaN
        for (int step = 0; step < kPageSteps; ++step) {
          if (key + step * 2 + 1 >= first_key && key + step * 2 < last_key) {
            std::memcpy(seen[step], values + step * step_bytes, sizeof seen[step]);
          } else {
            std::memset(seen[step], 0, sizeof seen[step]);
          }
        }
        values = seen[0];
        stride = sizeof seen[0];
      }
      load_tile<5>(this->weights[0] + key % kChunkKeys, sizeof this->weights[0]);
      each<kVecs>([&](auto v) {
        load_tile<7>(values + v.value * 64, stride);
        Bf16Tiles::multiply<v.value, 5, 7>();
      });
    }
    each<kVecs>([&](auto v) { store_tile<v.value>(sums + v.value * 64, kRowBytes); });
  }

 private:
  // f(Int<i>) for 0 <= i < kCount.
  template <int kCount, class F>
  static inline void each(const F& f) {
    if constexpr (kCount > 1) each<kCount - 1>(f);
    f(Int<kCount - 1>());
  }
};

// The same bits for few queries.
template <int kQueries>
struct TileOrderedCache : FloatCache<Bf16Format, kQueries> {
  using Base = FloatCache<Bf16Format, kQueries>;
  static constexpr int kTogether = kQueries <= 2 ? 4 : 2;

  template <int kPages>
  void score(const AttentionTile& tile, int page, float (*scores)[kChunkKeys]) const {
    constexpr int kTileInputs = 2 * kTileSteps;
    const uint8_t* keys[kPages];
    Vec totals[kQueries][kPages];
    for (int p = 0; p < kPages; ++p) {
      keys[p] = page_at(tile, page + p);
      for (int q = 0; q < kQueries; ++q) totals[q][p] = zero();
    }
    for (int first = 0; first < tile.head_dim; first += kTileInputs) {
      const int end = tile.head_dim - first < kTileInputs ? tile.head_dim : first + kTileInputs;
      TileSum parts[kQueries][kPages];
      for (int d = first; d < end; d += 2) {
        for (int p = 0; p < kPages; ++p) {
          const Pairs key(keys[p] + d / 2 * 64);
          for (int q = 0; q < kQueries; ++q) parts[q][p].add(key, this->queries[q] + d);
        }
      }
      for (int q = 0; q < kQueries; ++q) {
        for (int p = 0; p < kPages; ++p) totals[q][p] = totals[q][p] + parts[q][p].total();
      }
    }
    const int column = page * kLanes % kChunkKeys;
    for (int q = 0; q < kQueries; ++q) {
      for (int p = 0; p < kPages; ++p) store(scores[q] + column + p * kLanes, totals[q][p]);
    }
  }

  template <int kVecs>
  void sum(const AttentionTile& tile, int first_key, int last_key, int vec,
           float (*out)[kMaxHeadDim]) const {
    const int64_t step_bytes = round_up(tile.head_dim, kLanes) / kLanes * 64;
    Vec totals[kQueries][kVecs];
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVecs; ++v) totals[q][v] = zero();
    }
    for (int page = first_key / kLanes; page * kLanes < last_key; ++page) {
      const int begin = page * kLanes < first_key ? first_key / 2 * 2 : page * kLanes;
      const int end = (page + 1) * kLanes < last_key ? (page + 1) * kLanes : last_key;
      const uint8_t* values = page_at(tile, page) + tile.pages.value_offset + vec * 64;
      TileSum parts[kQueries][kVecs];
      for (int key = begin; key < end; key += 2) {
        for (int v = 0; v < kVecs; ++v) {
          const Pairs value(values + key % kLanes / 2 * step_bytes + v * 64);
          for (int q = 0; q < kQueries; ++q)
            parts[q][v].add(value, this->weights[q] + key % kChunkKeys);
        }
      }
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kVecs; ++v) totals[q][v] = totals[q][v] + parts[q][v].total();
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVecs; ++v) store(out[q] + (vec + v) * kLanes, totals[q][v]);
    }
  }
};

template <class Format>
static void attend_in_tiles(const AttentionTile& tile, int chunk, float* const* states) {
  constexpr int kMostWithoutTiles = 4;
  with_tile_rounding([&] {
    if (tile.num_queries > kMostWithoutTiles) {
      TiledCache<kMaxTileQueries>::configure(tile);
      attend_queries<TiledCache<kMaxTileQueries>, kMaxTileQueries>(tile, chunk, states);
      return release_tiles();
    }
    with_constant<kMostWithoutTiles>(tile.num_queries, [&](auto n) {
      constexpr int kQueries = decltype(n)::value;
      attend_queries<TileOrderedCache<kQueries>, kQueries>(tile, chunk, states);
    });
  });
}
