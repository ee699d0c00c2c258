// Stand-in for CUDA's header of this name.
#pragma once

#include "small_float.h"

using __nv_bfloat16 = SmallFloat<7>;

inline float __bfloat162float(__nv_bfloat16 value) { return value.decode(); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16::encode(value); }
