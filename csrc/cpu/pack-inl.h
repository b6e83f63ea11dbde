// Packing rows of a weight matrix into a panel, and reading a row back.

static uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static uint16_t to_f16(float x) {  // to nearest, even; too large is infinite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;
  if (bits < 0x38800000) {  // subnormal there: the sum rounds at the last bit that remains
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xC8000FFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | bits >> 13);
}

static float from_f16(uint16_t half) {
  uint16_t halves[kLanes] = {half};
  float lanes[kLanes];
  store(lanes, load_f16(halves));
  return lanes[0];
}

struct Quantized {
  float scale, minimum;
};

// Scale (and minimum) of a group of weights, w = scale * q + minimum with integer q in [-8, 7]: of
// some candidate roundings the one that is most like the weights, by their correlation. Its scale
// leaves an error that is orthogonal to the weights. Least squares would have it orthogonal to the
// rounded ones, which are shorter then: all matrices of a model would shrink by what their error is
// of them, near 0.6 %, and its predictions become flatter.
static Quantized fit_int4(const float* x, int n, bool is_asymmetric) {
  Vec lowest = load(x), highest = lowest;
  for (int i = kLanes; i < n; i += kLanes) {
    lowest = min(lowest, load(x + i));
    highest = max(highest, load(x + i));
  }
  const float low = -reduce_max(zero() - lowest), high = reduce_max(highest);
  const float count = static_cast<float>(n);
  const float middle = is_asymmetric ? 0.5f * (low + high) : 0.0f;
  const Vec offset = broadcast(middle);
  Vec sum_x = zero(), sum_xx = zero();
  for (int i = 0; i < n; i += kLanes) {
    const Vec v = load(x + i) - offset;
    sum_x = sum_x + v;
    sum_xx = fma(v, v, sum_xx);
  }
  const float mean_x = is_asymmetric ? reduce_add(sum_x) / count : 0.0f;
  const float xx = reduce_add(sum_xx) - count * mean_x * mean_x;
  Quantized best = {0, is_asymmetric ? low : 0};
  float best_likeness = 0;
  for (int candidate = 0; candidate < 9; ++candidate) {
    float scale, shift = 0;
    if (is_asymmetric) {
      scale = (high - low) / (15.0f + 0.4f * static_cast<float>(candidate - 1));
      shift = 0.5f * scale;
    } else {
      // the weight of largest magnitude takes the side of -8, which is the longer one
      scale = (-low > high ? low : high) / (-8.0f - 0.25f * static_cast<float>(candidate - 4));
    }
    if (!(scale != 0)) break;
    const Vec inverse = broadcast(1.0f / scale), shifts = broadcast(shift);
    Vec sum_q = zero(), sum_qq = zero(), sum_qx = zero();
    for (int i = 0; i < n; i += kLanes) {
      const Vec v = load(x + i) - offset;
      const Vec q = min(broadcast(7), max(broadcast(-8), round((v - shifts) * inverse)));
      sum_q = sum_q + q;
      sum_qq = fma(q, q, sum_qq);
      sum_qx = fma(q, v, sum_qx);
    }
    float qq = reduce_add(sum_qq), qx = reduce_add(sum_qx), mean_q = 0;
    if (is_asymmetric) {
      mean_q = reduce_add(sum_q) / count;
      qq -= count * mean_q * mean_q;
      qx -= count * mean_q * mean_x;
    }
    const float likeness = qx * qx / qq;
    if (likeness > best_likeness) {
      best_likeness = likeness;
      best.scale = xx / qx;
      if (is_asymmetric) best.minimum = middle + mean_x - best.scale * mean_q;
    }
  }
  return best;
}

static void pack_integers(const Matrix& w, const float* const* rows, uint8_t* panel, void* scales,
                          uint16_t* minimums) {
  const int64_t padded_k = w.padded_k(), groups = w.groups();
  const int group = static_cast<int>(w.group == 0 ? padded_k : w.group);
  const bool is_int4 = w.kind == WeightKind::kInt4;
  const float lowest = is_int4 ? -8 : -127, highest = is_int4 ? 7 : 127;
  const int zero_point = is_int4 ? 8 : 128;
  for (int lane = 0; lane < kPanelWidth; ++lane) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group;
      const float* x = rows[lane] + first;
      Quantized fit = {0, 0};
      if (is_int4) {
        fit = fit_int4(x, group, minimums != nullptr);
      } else {
        Vec largest = zero();
        for (int i = 0; i < group; i += kLanes) largest = max(largest, abs(load(x + i)));
        fit.scale = reduce_max(largest) / 127;
      }
      // integers cannot tell of NaN and infinity: the scale becomes NaN
      Vec probe = zero();
      for (int i = 0; i < group; i += kLanes) probe = fma(load(x + i), zero(), probe);
      fit.scale += reduce_add(probe);
      if (w.group == 0) {
        static_cast<float*>(scales)[lane] = fit.scale;
      } else {
        const uint16_t scale = to_f16(fit.scale);
        static_cast<uint16_t*>(scales)[g * kPanelWidth + lane] = scale;
        fit.scale = from_f16(scale);  // what products will use
        if (minimums) {
          minimums[g * kPanelWidth + lane] = to_f16(fit.minimum);
          fit.minimum = from_f16(minimums[g * kPanelWidth + lane]);
        }
      }
      const Vec inverse = broadcast(fit.scale == 0 ? 0.0f : 1 / fit.scale);
      const Vec minimum = broadcast(fit.minimum);
      for (int i = 0; i < group; i += kLanes) {
        const Vec q = min(broadcast(highest),
                          max(broadcast(lowest), round((load(x + i) - minimum) * inverse)));
        int8_t integers[kLanes];
        store_i8(integers, round_to_int(q));
        for (int j = 0; j < kLanes; ++j) {
          const int64_t k = first + i + j;
          const int byte = integers[j] + zero_point;
          if (!is_int4) {
            panel[k / 4 * 256 + lane * 4 + k % 4] = static_cast<uint8_t>(byte);
          } else {
            uint8_t& both = panel[k / 8 * 256 + lane * 4 + k % 4];
            both = static_cast<uint8_t>(k % 8 < 4 ? byte : both | byte << 4);
          }
        }
      }
    }
  }
}

static void pack_panel(const Matrix& w, const float* const* rows, uint8_t* panel, void* scales,
                       uint16_t* minimums) {
  const int64_t padded_k = w.padded_k();
  switch (w.kind) {
    case WeightKind::kFp32: {
      auto* out = reinterpret_cast<float*>(panel);
      for (int64_t k = 0; k < padded_k; ++k) {
        for (int lane = 0; lane < kPanelWidth; ++lane) out[k * kPanelWidth + lane] = rows[lane][k];
      }
      break;
    }
    case WeightKind::kBf16: {
      auto* out = reinterpret_cast<uint16_t*>(panel);
      for (int64_t k = 0; k < padded_k; ++k) {
        for (int lane = 0; lane < kPanelWidth; ++lane) {
          out[(k / 2 * kPanelWidth + lane) * 2 + k % 2] = to_bf16(rows[lane][k]);
        }
      }
      break;
    }
    default:
      pack_integers(w, rows, panel, scales, minimums);
  }
}

static void unpack_row(const Matrix& w, int row, float* out) {
  const int64_t panel_index = row / kPanelWidth, groups = w.groups();
  const int lane = row % kPanelWidth;
  const uint8_t* panel = w.data + panel_index * w.panel_bytes();
  const int64_t padded = round_up(w.k, kLanes);
  for (int64_t k = 0; k < padded; ++k) {
    if (k >= w.k) {  // an asymmetric format may hold something else there
      out[k] = 0;
      continue;
    }
    switch (w.kind) {
      case WeightKind::kFp32:
        std::memcpy(out + k, panel + (k * kPanelWidth + lane) * 4, 4);
        break;
      case WeightKind::kBf16: {
        uint16_t half;
        std::memcpy(&half, panel + ((k / 2 * kPanelWidth + lane) * 2 + k % 2) * 2, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(out + k, &bits, 4);
        break;
      }
      default: {
        const bool is_int4 = w.kind == WeightKind::kInt4;
        int q;
        if (is_int4) {
          const uint8_t both = panel[k / 8 * 256 + lane * 4 + k % 4];
          q = (k % 8 < 4 ? both & 15 : both >> 4) - 8;
        } else {
          q = panel[k / 4 * 256 + lane * 4 + k % 4] - 128;
        }
        if (w.group == 0) {
          out[k] = static_cast<float*>(const_cast<void*>(w.scales))[row] * static_cast<float>(q);
        } else {
          const int64_t at = (panel_index * groups + k / w.group) * kPanelWidth + lane;
          const float scale = from_f16(static_cast<const uint16_t*>(w.scales)[at]);
          const float minimum = w.minimums ? from_f16(w.minimums[at]) : 0.0f;
          out[k] = scale * static_cast<float>(q) + minimum;
        }
      }
    }
  }
}
