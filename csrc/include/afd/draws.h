// Normal and exponential draws from random bits, in plain float arithmetic: +, *, / and sqrt round alike everywhere, so
// CPU, CUDA and every vector width give the same bits. log, sin and cos are Taylor series on ranges so short that five
// terms reach float's precision (relative errors below 2e-7; cos near its zeros is a sin near its own).
#pragma once

#include <cmath>

#include "afd/common.h"

namespace afd {

// Uniform on the 2^23 odd multiples of 2^-24 in (0, 1).
AFD_HOST_DEVICE float open_uniform(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(2 * (bits >> 9) + 1)) * (1.0f / (1 << 24));
}

// -log(u) for normal u in (0, 1). With u = m * 2^e, m in [1/sqrt(2), sqrt(2)) and s = (m - 1) / (m + 1):
// log(u) = e * log(2) + 2 * (s + s^3/3 + s^5/5 + ...), |s| < 0.172.
AFD_HOST_DEVICE float minus_log(float u) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = bits_of(u) - kRootHalf;
  const float exponent = static_cast<float>(bits >> 23);
  const float m = float_of((bits & 0x007fffff) + kRootHalf);
  const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const float series = 1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return -(exponent * 0.69314718f + 2.0f * s * series);
}

struct TwoFloats {
  float first, second;
};

// cos(pi t) and sin(pi t) for t in (-1, 1): the nearest quarter turn is split off exactly.
AFD_HOST_DEVICE TwoFloats cos_sin_pi(float t) {
  const int quarter = static_cast<int>(2.0f * t + 2.5f) - 2;  // of the turn: -2 ... 2
  const float y = (t - 0.5f * static_cast<float>(quarter)) * 3.14159265f, z = y * y;
  const float sin_y = y * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float cos_y =
      1.0f + z * (-1.0f / 2 + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  const bool odd = quarter & 1;
  const float c = odd ? sin_y : cos_y, s = odd ? cos_y : sin_y;
  return {(quarter == 1) | (quarter == 2) | (quarter == -2) ? -c : c,
          (quarter == -1) | (quarter == 2) | (quarter == -2) ? -s : s};
}

// Two independent standard normals (Box & Muller 1958).
AFD_HOST_DEVICE TwoFloats normal_pair(uint32_t radius_bits, float symmetric_turn) {
  const float radius = sqrtf(2.0f * minus_log(open_uniform(radius_bits)));
  const TwoFloats unit = cos_sin_pi(symmetric_turn);
  return {radius * unit.first, radius * unit.second};
}

AFD_HOST_DEVICE float exponential(uint32_t bits) { return minus_log(open_uniform(bits)); }

// An exponential with a random sign, which comes from a bit that its size does not use.
AFD_HOST_DEVICE float signed_exponential(uint32_t bits) {
  const float size = exponential(bits);
  return bits & 1 ? -size : size;
}

}  // namespace afd
