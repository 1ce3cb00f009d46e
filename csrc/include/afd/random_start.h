// A uniform random point of the L-infinity ball around x, clamped to the bounds:
//
//     out = clamp(x + eps * u, low, high),    u uniform in (-1, 1) from Philox(seed; sample index, element)
//
// The draw is a function of (seed, first_sample + row, element) alone.
#pragma once

#include "afd/common.h"
#include "afd/philox.h"

namespace afd {

constexpr uint32_t kRandomStartStream = 0;

struct RandomStart {
  const float* x;  // [samples, elements]
  float* out;      // same; may be x itself
  int64_t samples, elements;
  PerSample eps;
  float low, high;
  uint64_t seed;
  uint64_t first_sample;
};

AFD_HOST_DEVICE float random_start_element(float x, float uniform, float eps, float low, float high) {
  return min_of(high, max_of(low, x + eps * uniform));
}

namespace cpu {
void random_start(const RandomStart& args, Launch launch);
}
namespace cuda {
int random_start(const RandomStart& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
