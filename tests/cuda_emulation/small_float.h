// A 16-bit floating-point number with `kMantissa` stored mantissa bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

template <int kMantissa>
struct SmallFloat {
  static constexpr int kExponent = 15 - kMantissa;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kSpecial = (1 << kExponent) - 1;

  uint16_t bits;

  float decode() const {
    const int exponent = bits >> kMantissa & kSpecial;
    const int mantissa = bits & ((1 << kMantissa) - 1);
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == kSpecial) return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - kBias - kMantissa);
    return sign * std::ldexp(static_cast<float>(mantissa | 1 << kMantissa), exponent - kBias - kMantissa);
  }

  static SmallFloat encode(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return {static_cast<uint16_t>(kSpecial << kMantissa | 1)};
    if (std::isinf(value)) return {static_cast<uint16_t>(sign | kSpecial << kMantissa)};
    if (value == 0.0f) return {sign};
    const int exponent = std::max(std::ilogb(value), 1 - kBias);
    // Counted in units of the last place; a carry into the next binade comes out right by itself.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), kMantissa - exponent)));
    const int magnitude = units + ((exponent + kBias - 1) << kMantissa);
    return {static_cast<uint16_t>(sign | std::min(magnitude, kSpecial << kMantissa))};
  }
};
