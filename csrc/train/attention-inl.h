// Causal attention of the query heads that read one key head, forward and backward, kBlockQueries
// queries at a time against all keys that they see. Their scores are in scratch memory, so it grows
// with the number of keys, and no matrix of all queries and keys is ever formed.
//
// Forward, with scores s = q k^T: m = max s, p = exp(scale (s - m)), out = p v / sum p, and
// lse = scale m + log(sum p) is kept. Backward, with p = exp(scale s - lse):
//   dv = p^T dout    dp = dout v^T    ds = scale p (dp - sum_d(dout out))    dq = ds k    dk = ds^T
//   q
// Reference: Dao, 2023, https://arxiv.org/abs/2307.08691

constexpr int64_t kBlockQueries = 48;  // whole tiles of every ISA

// Hands out parts of scratch memory, each aligned to a cache line; from null it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* part = base ? base + used : nullptr;
    used += round_up(floats, kLanes);
    return part;
  }
};

static inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// One head of one sequence: a row a token.
static inline Operand head_of(const void* x, Dtype dtype, const int64_t strides[3],
                              int64_t sequence, int64_t head) {
  const int64_t at = sequence * strides[0] + head * strides[2];
  return {static_cast<const uint8_t*>(x) + at * size_of(dtype), dtype, strides[1], 1};
}

template <class T>
static inline const T* elements_of(const Operand& x) {
  return static_cast<const T*>(x.data);
}

// The keys that a block of queries sees, and those of a single one.
struct KeyRange {
  int64_t first_position, window;  // of the first query of the block
  int64_t count;                   // queries

  int64_t begin(int64_t query) const {
    const int64_t first = first_position + query + 1 - window;
    return first > 0 ? first : 0;
  }
  int64_t end(int64_t query) const { return first_position + query + 1; }
  int64_t first_panel() const { return begin(0) / kPanel; }
  int64_t end_panel() const { return panels_of(end(count - 1)); }
};

template <class Format, class T>
struct HeadAttention {
  using Element = typename Format::Element;
  static constexpr int kRows = Format::kRows;
  const Attention& a;
  const int64_t sequence, kv_head;
  const int64_t T_ = a.num_queries, S = a.num_keys, D = a.head_dim;
  const int64_t padded_keys = panels_of(S) * kPanel, head_steps = steps_of<Format>(D);
  const int64_t padded_dim = panels_of(D) * kPanel;

  // As panels for q k^T: keys are columns.
  float* pack_tokens(const Operand& x, Arena& arena) const {
    float* packed = arena.take(padded_keys * head_steps);
    if (arena.base == nullptr) return nullptr;
    for (int64_t p = 0; p < panels_of(S); ++p) {
      pack_panel_of<Format>(elements_of<T>(x), x, p * kPanel, S, D,
                            packed + p * kPanel * head_steps);
    }
    return packed;
  }

  // As panels for p v: elements are columns, `inputs` tokens from `first` on are summed over.
  void pack_elements(const Operand& x, int64_t first, int64_t inputs, float* packed) const {
    const T* tokens = elements_of<T>(x) + first * x.row_stride;
    const Operand elements = x.transposed();
    for (int64_t p = 0; p < panels_of(D); ++p) {
      pack_panel_of<Format>(tokens, elements, p * kPanel, D, inputs,
                            packed + p * kPanel * steps_of<Format>(inputs));
    }
  }

  KeyRange keys_of(int64_t first_query, int64_t count) const {
    return {S - T_ + first_query, a.window, count};
  }

  // Products of the block's rows with all keys that one of them sees, to (queries, padded_keys).
  void score(const Rows& rows, const float* tokens, const KeyRange& keys, float* scores) const {
    for (int64_t p = keys.first_panel(); p < keys.end_panel(); ++p) {
      // queries before the panel see none of it
      const int64_t before = p * kPanel - keys.first_position;
      const int64_t skipped = before > 0 ? before / kRows * kRows : 0;
      Rows seeing = rows;
      seeing.units += skipped / kRows * rows.tile_stride;
      multiply_panel<Format>(seeing, tokens + p * kPanel * head_steps, keys.count - skipped, kPanel,
                             head_steps, scores + skipped * padded_keys + p * kPanel, padded_keys,
                             false, [](int64_t) {});
    }
  }

  // out (queries, padded_dim) = weights (queries, padded_keys) times all tokens, packed by
  // elements.
  void weigh(const Element* weights, const float* elements, const KeyRange& keys,
             float* out) const {
    const int64_t first = keys.first_panel() * kPanel / Format::kInputs;
    const int64_t steps = steps_of<Format>(keys.end(keys.count - 1)) - first;
    const int64_t stride = padded_keys / Format::kInputs;
    const Rows rows = {reinterpret_cast<const float*>(weights) + first, stride, 1, kRows * stride};
    for (int64_t p = 0; p < panels_of(D); ++p) {
      const float* panel = elements + (p * steps_of<Format>(S) + first) * kPanel;
      multiply_panel<Format>(rows, panel, keys.count, D - p * kPanel, steps, out + p * kPanel,
                             padded_dim, false, [](int64_t) {});
    }
  }

  // f(key, begin, end) for the first key of each Vec of keys that the query sees some of: those
  // from `begin` on and before `end`.
  template <class F>
  static void each_vec(const KeyRange& keys, int64_t query, const F& f) {
    const int64_t begin = keys.begin(query), end = keys.end(query);
    for (int64_t key = begin / kLanes * kLanes; key < end; key += kLanes) f(key, begin, end);
  }
  static Vec keep_seen(Vec x, int64_t key, int64_t begin, int64_t end, float other) {
    if (key >= begin && key + kLanes <= end) return x;
    return keep_lanes(x, static_cast<int>(begin - key), static_cast<int>(end - key), other);
  }
  // Zeros where a query of the block sees no key, but others do.
  static void clear_unseen(const KeyRange& keys, int64_t query, Element* row) {
    const int64_t first = keys.first_panel() * kPanel;
    const int64_t begin = keys.begin(query) / kLanes * kLanes;
    const int64_t end = round_up(keys.end(query), kLanes), last = keys.end_panel() * kPanel;
    std::memset(row + first, 0, (begin - first) * sizeof(Element));
    std::memset(row + end, 0, (last - end) * sizeof(Element));
  }

  int64_t forward(float* scratch) const {
    Arena arena = {scratch};
    float* keys_packed = pack_tokens(head_of(a.k, a.dtype, a.k_strides, sequence, kv_head), arena);
    float* values = arena.take(padded_dim * steps_of<Format>(S));
    float* query_rows = arena.take(kBlockQueries * head_steps);
    float* scores = arena.take(kBlockQueries * padded_keys);
    auto* weights = reinterpret_cast<Element*>(arena.take(kBlockQueries * padded_keys));
    float* sums = arena.take(kBlockQueries * padded_dim);
    if (scratch == nullptr) return arena.used;

    pack_elements(head_of(a.v, a.dtype, a.v_strides, sequence, kv_head), 0, S, values);
    const int64_t group = a.num_heads / a.num_kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Operand q = head_of(a.q, a.dtype, a.q_strides, sequence, head);
      for (int64_t first = 0; first < T_; first += kBlockQueries) {
        const int64_t count = T_ - first < kBlockQueries ? T_ - first : kBlockQueries;
        const KeyRange keys = keys_of(first, count);
        const Rows rows =
            pack_rows_of<Format>(elements_of<T>(q), q, first, count, T_, D, query_rows);
        score(rows, keys_packed, keys, scores);
        float totals[kBlockQueries];
        for (int64_t r = 0; r < count; ++r) {
          totals[r] = softmax(keys, r, scores + r * padded_keys, weights + r * padded_keys,
                              a.lse + (sequence * a.num_heads + head) * T_ + first + r);
        }
        weigh(weights, values, keys, sums);
        for (int64_t r = 0; r < count; ++r) {
          const Vec inverse = broadcast(1.0f / totals[r]);
          T* out = output_row(a.out, first + r, head);
          for (int64_t d = 0; d < D; d += kLanes) {
            store_first_elements(out + d, load(sums + r * padded_dim + d) * inverse, D - d);
          }
        }
      }
    }
    return arena.used;
  }

  T* output_row(void* x, int64_t token, int64_t head) const {
    return static_cast<T*>(x) + ((sequence * T_ + token) * a.num_heads + head) * D;
  }

  // From scores to exp(scale (s - m)); returns their sum.
  float softmax(const KeyRange& keys, int64_t query, const float* scores, Element* weights,
                float* lse) const {
    Vec largest = broadcast(-3.4e38f);
    each_vec(keys, query, [&](int64_t key, int64_t begin, int64_t end) {
      largest = max(largest, keep_seen(load(scores + key), key, begin, end, -3.4e38f));
    });
    const float top = reduce_max(largest);
    const Vec scale = broadcast(a.scale), shift = broadcast(-top);
    Vec total = zero();
    each_vec(keys, query, [&](int64_t key, int64_t begin, int64_t end) {
      const Vec weight =
          keep_seen(exp((load(scores + key) + shift) * scale), key, begin, end, 0.0f);
      total = total + weight;
      store_elements(weights + key, weight);
    });
    clear_unseen(keys, query, weights);
    const float sum = reduce_add(total);
    *lse = top * a.scale + std::log(sum);
    return sum;
  }

  int64_t backward(float* scratch) const {
    Arena arena = {scratch};
    const Operand k = head_of(a.k, a.dtype, a.k_strides, sequence, kv_head);
    const Operand v = head_of(a.v, a.dtype, a.v_strides, sequence, kv_head);
    const float* key_columns = pack_tokens(k, arena);
    const float* value_columns = pack_tokens(v, arena);
    float* key_elements = arena.take(padded_dim * steps_of<Format>(S));
    float* block_rows = arena.take(kBlockQueries * head_steps);
    float* block_elements = arena.take(padded_dim * steps_of<Format>(kBlockQueries));
    float* scores = arena.take(kBlockQueries * padded_keys);
    float* dweights = arena.take(kBlockQueries * padded_keys);
    auto* weights = reinterpret_cast<Element*>(arena.take(kBlockQueries * padded_keys));
    auto* dscores = reinterpret_cast<Element*>(arena.take(kBlockQueries * padded_keys));
    const int64_t key_rows = round_up(padded_keys, kRows);
    float* transposed = arena.take(key_rows * (steps_of<Format>(kBlockQueries) + kLanes));
    float* dq = arena.take(kBlockQueries * padded_dim);
    float* dk = arena.take(key_rows * padded_dim);
    float* dv = arena.take(key_rows * padded_dim);
    if (scratch == nullptr) return arena.used;

    std::memset(dk, 0, key_rows * padded_dim * sizeof(float));
    std::memset(dv, 0, key_rows * padded_dim * sizeof(float));
    pack_elements(k, 0, S, key_elements);
    const int64_t group = a.num_heads / a.num_kv_heads;
    const int64_t out_strides[3] = {T_ * a.num_heads * D, a.num_heads * D, D};
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Operand q = head_of(a.q, a.dtype, a.q_strides, sequence, head);
      const Operand dout = head_of(a.dout, a.dtype, out_strides, sequence, head);
      for (int64_t first = 0; first < T_; first += kBlockQueries) {
        const int64_t count = T_ - first < kBlockQueries ? T_ - first : kBlockQueries;
        const KeyRange keys = keys_of(first, count);
        const auto rows_of = [&](const Operand& x) {
          return pack_rows_of<Format>(elements_of<T>(x), x, first, count, T_, D, block_rows);
        };
        score(rows_of(q), key_columns, keys, scores);
        score(rows_of(dout), value_columns, keys, dweights);
        for (int64_t r = 0; r < count; ++r) {
          const float delta = dot(elements_of<T>(dout) + (first + r) * dout.row_stride,
                                  output_row(a.out, first + r, head));
          softmax_backward(keys, r, a.lse[(sequence * a.num_heads + head) * T_ + first + r], delta,
                           scores + r * padded_keys, dweights + r * padded_keys,
                           weights + r * padded_keys, dscores + r * padded_keys);
        }
        weigh(dscores, key_elements, keys, dq);
        for (int64_t r = 0; r < count; ++r) {
          T* out = output_row(a.dq, first + r, head);
          for (int64_t d = 0; d < D; d += kLanes) {
            store_first_elements(out + d, load(dq + r * padded_dim + d), D - d);
          }
        }
        pack_elements(dout, first, count, block_elements);
        add_transposed(weights, block_elements, keys, transposed, dv);
        pack_elements(q, first, count, block_elements);
        add_transposed(dscores, block_elements, keys, transposed, dk);
      }
    }
    for (int64_t token = 0; token < S; ++token) {
      const int64_t at = ((sequence * S + token) * a.num_kv_heads + kv_head) * D;
      for (int64_t d = 0; d < D; d += kLanes) {
        store_first_elements(static_cast<T*>(a.dk) + at + d, load(dk + token * padded_dim + d),
                             D - d);
        store_first_elements(static_cast<T*>(a.dv) + at + d, load(dv + token * padded_dim + d),
                             D - d);
      }
    }
    return arena.used;
  }

  float dot(const T* x, const T* y) const {
    Vec sum = zero();
    for (int64_t d = 0; d < D; d += kLanes) {
      sum = fma(load_first(x + d, D - d), load_first(y + d, D - d), sum);
    }
    return reduce_add(sum);
  }

  // From scores and the gradients of the weights to the weights and the gradients of the scores.
  void softmax_backward(const KeyRange& keys, int64_t query, float lse, float delta,
                        const float* scores, const float* dweights, Element* weights,
                        Element* dscores) const {
    const Vec scale = broadcast(a.scale), shift = broadcast(-lse), minus_delta = broadcast(-delta);
    each_vec(keys, query, [&](int64_t key, int64_t begin, int64_t end) {
      const Vec weight =
          keep_seen(exp(fma(load(scores + key), scale, shift)), key, begin, end, 0.0f);
      const Vec dweight = keep_seen(load(dweights + key), key, begin, end, 0.0f);
      store_elements(weights + key, weight);
      store_elements(dscores + key, weight * (dweight + minus_delta) * scale);
    });
    clear_unseen(keys, query, weights);
    clear_unseen(keys, query, dscores);
  }

  // out (keys, padded_dim) += weights^T times the block's rows, packed by elements.
  void add_transposed(const Element* weights, const float* elements, const KeyRange& keys,
                      float* transposed, float* out) const {
    const int64_t first = keys.first_panel() * kPanel, num_keys = keys.end(keys.count - 1) - first;
    const int64_t steps = steps_of<Format>(keys.count);
    const Operand columns = {weights, a.dtype, 1, padded_keys};
    // a tile that ends behind the last key adds zeros there, where blocks to come have their sums
    const Rows rows = pack_rows_of<Format>(weights, columns, first, num_keys, first + num_keys,
                                           keys.count, transposed);
    for (int64_t p = 0; p < panels_of(D); ++p) {
      multiply_panel<Format>(rows, elements + p * kPanel * steps, num_keys, D - p * kPanel, steps,
                             out + first * padded_dim + p * kPanel, padded_dim, true,
                             [](int64_t) {});
    }
  }
};

template <class F>
static auto with_head(const Attention& a, int64_t sequence, int64_t kv_head, const F& f) {
  if (a.dtype == Dtype::kFp32) {
    return f(HeadAttention<Fp32Format, float>{a, sequence, kv_head});
  }
  return f(HeadAttention<Bf16Format, uint16_t>{a, sequence, kv_head});
}

static int64_t attention_scratch(const Attention& a) {
  return with_head(a, 0, 0, [&](const auto& head) {
    return a.dout ? head.backward(nullptr) : head.forward(nullptr);
  });
}

static void attention_forward(const Attention& a, int64_t sequence, int64_t kv_head,
                              float* scratch) {
  with_head(a, sequence, kv_head, [&](const auto& head) { return head.forward(scratch); });
}

static void attention_backward(const Attention& a, int64_t sequence, int64_t kv_head,
                               float* scratch) {
  with_head(a, sequence, kv_head, [&](const auto& head) { return head.backward(scratch); });
}
