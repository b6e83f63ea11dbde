// e^x, relative error below 2^-22; saturates beyond e^-87 and e^88; NaN stays NaN.
static inline Vec exp(Vec x) {
  x = min(broadcast(88.0f), max(broadcast(-87.0f), x));
  const Vec n = round(x * broadcast(1.4426950408889634f));
  // x - n ln 2, with ln 2 in two parts so that the first product is exact
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // the polynomial of the least relative error for |r| <= ln 2 / 2, which is 2^-29
  constexpr float kCoefficients[] = {0.008374857f, 0.041668229f, 0.1666642f,
                                     0.4999999f,   1.0f,         1.0f};
  Vec series = broadcast(0.0013836795f);
  for (const float coefficient : kCoefficients) series = fma(series, r, broadcast(coefficient));
  return scale_by_power_of_2(series, n);
}
