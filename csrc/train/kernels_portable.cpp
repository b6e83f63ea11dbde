// The training kernels for any CPU: what the compiler makes of them for its baseline.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace leangpt::train::portable {

#include "../cpu/vec_portable.h"
#include "fp32_format.h"
#include "transpose_portable.h"
//
#include "formats_portable.h"
#include "kernels-inl.h"

}  // namespace leangpt::train::portable
