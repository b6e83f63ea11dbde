// The kernels for any CPU: what the compiler makes of them for its baseline.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace leangpt::cpu::portable {

#include "vec_portable.h"
//
#include "blocks_none.h"
//
#include "products.h"
//
#include "kernels-inl.h"

}  // namespace leangpt::cpu::portable
