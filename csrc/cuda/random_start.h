// What a thread of random_start does in Linf; the kernel adds the launch. Host-and-device code (tiles.h).
#pragma once

#include "afd/random_start.h"
#include "cuda/tiles.h"

namespace afd::cuda {

AFD_HOST_DEVICE Grid random_start_grid(const RandomStart& a) { return grid_of(ceil_div(a.elements, 4), a.samples); }

// The four elements of one sample that one Philox block serves, or those of them that the sample has. They begin at a
// multiple of four in the sample: a 16-byte access serves them where the sample begins on a boundary. Behind the last
// block there are none.
AFD_HOST_DEVICE Run start_block(const RandomStart& a, uint64_t seed, int64_t sample, float eps, int64_t block) {
  const Philox drawn =
      philox_at(seed, a.first_sample + static_cast<uint64_t>(sample), static_cast<uint32_t>(block), kRandomStartStream);
  const uint32_t words[4] = {drawn.v0, drawn.v1, drawn.v2, drawn.v3};
  const int64_t left = a.elements - 4 * block, at = sample * a.elements + 4 * block;
  const int count = left < 4 ? static_cast<int>(left) : 4;
  Run run = {a.out + at, get(a.x + at, count), 0, count};
  for (int k = 0; k < 4; ++k)
    run.quad.v[k] = random_start_element(run.quad.v[k], symmetric_uniform(words[k]), eps, a.low, a.high);
  return run;
}

}  // namespace afd::cuda
