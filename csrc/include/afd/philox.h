// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// A value depends on nothing but its key and counter, so any thread, device or batch split draws the same numbers.
#pragma once

#include "afd/common.h"

namespace afd {

struct Philox {
  uint32_t v0, v1, v2, v3;
};

AFD_HOST_DEVICE Philox philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  AFD_UNROLL_10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The four numbers of elements 4 * block ... 4 * block + 3 of one sample. `stream` separates uses that share a seed.
AFD_HOST_DEVICE Philox philox_at(uint64_t seed, uint64_t sample, uint32_t block, uint32_t stream) {
  return philox4x32(seed, block, stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32));
}

// Uniform on the 2^23 odd multiples of 2^-23 in (-1, 1): symmetric, exact in float, never 0 or +-1.
AFD_HOST_DEVICE float symmetric_uniform(uint32_t bits) {
  const int32_t odd = static_cast<int32_t>(2 * (bits >> 9) + 1) - (1 << 23);
  return static_cast<float>(odd) * (1.0f / (1 << 23));
}

}  // namespace afd
