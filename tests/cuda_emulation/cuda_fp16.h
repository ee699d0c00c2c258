// Stand-in for CUDA's header of this name.
#pragma once

#include "small_float.h"

using __half = SmallFloat<10>;

inline float __half2float(__half value) { return value.decode(); }
inline __half __float2half_rn(float value) { return __half::encode(value); }
