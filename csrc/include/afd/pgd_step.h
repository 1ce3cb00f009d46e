// One L-infinity step of projected gradient ascent (Madry et al. 2018), per element:
//
//     out = clamp(clamp(x_adv + alpha * sign(grad), x - eps, x + eps), low, high)
//
// The ball is enforced by min/max against x -+ eps (as AutoAttack does), not through delta = x_adv - x, which would
// round once more. sign(0) and sign(NaN) are 0, as in torch.sign; NaN in x_adv, x or eps gives NaN.
#pragma once

#include "afd/common.h"

namespace afd {

struct PgdStep {
  const float* x_adv;  // [samples, elements]
  const float* x;      // same
  const void* grad;    // same, of grad_dtype
  float* out;          // same; may be x_adv itself
  DType grad_dtype;
  int64_t samples, elements;
  PerSample alpha, eps;
  float low, high;
};

AFD_HOST_DEVICE float sign_of(float g) { return static_cast<float>((g > 0.0f) - (g < 0.0f)); }

// The sign of a 16-bit float needs only its bits; `infinity` is the type's +inf pattern, above which lies NaN.
AFD_HOST_DEVICE float sign_of_bits(uint16_t bits, uint16_t infinity) {
  const int magnitude = bits & 0x7fff;
  const int nonzero = (magnitude != 0) & (magnitude <= infinity);
  return static_cast<float>(nonzero * (1 - 2 * (bits >> 15)));
}

struct GradF32 {
  using type = float;
  AFD_HOST_DEVICE float sign(float g) { return sign_of(g); }
};
struct GradF16 {
  using type = uint16_t;
  AFD_HOST_DEVICE float sign(uint16_t g) { return sign_of_bits(g, 0x7c00); }
};
struct GradBF16 {
  using type = uint16_t;
  AFD_HOST_DEVICE float sign(uint16_t g) { return sign_of_bits(g, 0x7f80); }
};

AFD_HOST_DEVICE float pgd_step_element(float x_adv, float x, float sign, float alpha, float eps, float low,
                                       float high) {
  const float stepped = x_adv + alpha * sign;
  const float least = x - eps, most = x + eps;
  const float in_ball = min_of(most, max_of(least, stepped));
  const float in_bounds = min_of(high, max_of(low, in_ball));
  return least == least ? in_bounds : least;
}

namespace cpu {
void pgd_step(const PgdStep& args, Launch launch);
}
namespace cuda {
int pgd_step(const PgdStep& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
