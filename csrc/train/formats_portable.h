// Products of float32. Rounding to bf16, and products of bf16 on CPUs that have none: they are
// exact in float32.
static inline void store_elements(uint16_t* p, Vec v) { store_bf16(p, v); }

using Bf16Format = Fp32Format;
using Fp32Products = Fp32Format;
