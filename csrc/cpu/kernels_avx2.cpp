// The kernels for CPUs with AVX2 and FMA. Every header comes before the pragma, so that no function
// of theirs is compiled for this instruction set and then used on a lesser CPU.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace leangpt::cpu::avx2 {

#include "vec_avx2.h"
//
#include "products_avx2.h"
//
#include "kernels-inl.h"
//
#include "linear_avx2.h"

}  // namespace leangpt::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
