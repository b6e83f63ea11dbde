// The training kernels for CPUs with AVX2 and FMA. Every header comes before the pragma, so that no
// function of theirs is compiled for this instruction set and then used on a lesser CPU.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace leangpt::train::avx2 {

#include "../cpu/vec_avx2.h"
#include "fp32_format.h"
#include "transpose_portable.h"
//
#include "formats_portable.h"
#include "kernels-inl.h"

}  // namespace leangpt::train::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
