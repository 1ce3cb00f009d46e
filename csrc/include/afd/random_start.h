// A uniform random point of the ball around x, clamped to the bounds. With n elements a sample:
//
//     Linf   clamp(x + eps * u, low, high),   u uniform in (-1, 1)
//     L2     clamp(x + eps * g / |(g, g')|_2, low, high),   g and the two extra g' standard normal (Harman & Lacko, "On
//            decompositional algorithms for uniform sampling from n-spheres and n-balls", J. Multivariate Anal. 2010)
//     L1     clamp(x + eps * e / (|e|_1 + e'), low, high),   e exponential with random signs, e' exponential (Barthe,
//            Guedon, Mendelson & Naor, "A probabilistic approach to the geometry of the l_p^n-ball", Ann. Prob. 2005)
//
// Draws come from Philox(seed; sample index, element), extra ones from a stream of their own: they are a function of
// (seed, first_sample + row, element) alone.
#pragma once

#include <cmath>

#include "afd/common.h"
#include "afd/draws.h"
#include "afd/philox.h"

namespace afd {

constexpr uint32_t kRandomStartStream = 0, kRandomStartExtraStream = 1;

// The key of the generator: a number, or one that lies on the device, where a recorded graph finds a new one each time.
struct Key {
  const int64_t* place;  // null: `value` is the key
  uint64_t value;
  AFD_HOST_DEVICE_MEMBER operator uint64_t() const { return place ? static_cast<uint64_t>(*place) : value; }
};

struct RandomStart {
  const float* x;  // [samples, elements]
  float* out;      // same; in Linf it may be x itself, in L2 and L1 it holds the draws before they are scaled
  int64_t samples, elements;
  PerSample eps;
  float low, high;
  Norm norm;
  Key seed;
  uint64_t first_sample;
};

AFD_HOST_DEVICE float random_start_element(float x, float draw, float scale, float low, float high) {
  return min_of(high, max_of(low, x + scale * draw));
}

// What L2 and L1 draw, what of a draw they sum, the sum's extra terms, and what the draws are multiplied by.
struct BallL2 {
  AFD_HOST_DEVICE TwoFloats draw(uint32_t first, uint32_t second) {
    return normal_pair(first, symmetric_uniform(second));
  }
  AFD_HOST_DEVICE double term(float draw) { return static_cast<double>(draw) * static_cast<double>(draw); }
  AFD_HOST_DEVICE double extra(const Philox& drawn) {
    const TwoFloats pair = draw(drawn.v0, drawn.v1);
    return term(pair.first) + term(pair.second);
  }
  AFD_HOST_DEVICE float scale(float eps, double sum) { return static_cast<float>(eps / sqrt(sum)); }
};
struct BallL1 {
  AFD_HOST_DEVICE TwoFloats draw(uint32_t first, uint32_t second) {
    return {signed_exponential(first), signed_exponential(second)};
  }
  AFD_HOST_DEVICE double term(float draw) { return static_cast<double>(fabsf(draw)); }
  AFD_HOST_DEVICE double extra(const Philox& drawn) { return term(exponential(drawn.v0)); }
  AFD_HOST_DEVICE float scale(float eps, double sum) { return static_cast<float>(eps / sum); }
};

namespace cpu {
void random_start(const RandomStart& args, Launch launch);
}
namespace cuda {
int random_start(const RandomStart& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
