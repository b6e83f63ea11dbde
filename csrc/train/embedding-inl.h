// Rows of tables added up, and sums of the rows of a gradient.

static void add_rows(const void* a, const void* b, Dtype dtype, int64_t n, void* out) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec sum = load_first(static_cast<const T*>(a) + i, n - i) +
                      load_first(static_cast<const T*>(b) + i, n - i);
      store_first_elements(static_cast<T*>(out) + i, sum, n - i);
    }
  });
}

static void sum_of_rows(const void* x, Dtype dtype, int64_t n, const int64_t* rows, int64_t count,
                        void* out) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVecs = 4;  // of a row at a time
    for (int64_t first = 0; first < n; first += kVecs * kLanes) {
      Vec sums[kVecs];
      for (Vec& sum : sums) sum = zero();
      for (int64_t r = 0; r < count; ++r) {
        const T* row = static_cast<const T*>(x) + rows[r] * n;
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = first + v * kLanes;
          if (i < n) sums[v] = sums[v] + load_first(row + i, n - i);
        }
      }
      for (int v = 0; v < kVecs; ++v) {
        const int64_t i = first + v * kLanes;
        if (i < n) store_first_elements(static_cast<T*>(out) + i, sums[v], n - i);
      }
    }
  });
}
