// The training kernels for CPUs with AMX, and AVX-512, BF16 and VNNI. Every header comes before the
// pragma, so that no function of theirs is compiled for this instruction set and then used on a
// lesser CPU.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c," \
                          "amx-tile,amx-bf16,amx-int8"))),                                     \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#endif

namespace leangpt::train::amx {

#include "../cpu/vec_avx512.h"
#include "fp32_format.h"
#include "transpose_avx512.h"
//
#include "formats_amx.h"
#include "kernels-inl.h"

}  // namespace leangpt::train::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
