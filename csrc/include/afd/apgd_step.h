// The momentum step of Auto-PGD (Croce & Hein 2020, Algorithm 1) in the L-infinity ball, per element:
//
//     z     = P(x_adv + step * sign(grad))
//     x_new = P(x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old)),    P = clamp to x -+ eps, then to the bounds
//
// in place: x_adv_old becomes x_adv and x_adv becomes x_new. NaN in x_adv, x_adv_old, x, step or eps gives NaN; a zero
// or NaN gradient has no sign, so only the momentum moves such an element.
#pragma once

#include "afd/pgd_step.h"  // the signs of gradients

namespace afd {

struct ApgdStep {
  float* x_adv;      // [samples, elements]
  float* x_adv_old;  // same, apart from x_adv
  const float* x;    // same
  const void* grad;  // same, of grad_dtype
  DType grad_dtype;
  int64_t samples, elements;
  PerSample step, eps;
  float a, rest;  // rest is 1 - a, rounded once
  float low, high;
};

AFD_HOST_DEVICE float apgd_project_element(float point, float least, float most, float low, float high) {
  const float in_ball = min_of(most, max_of(least, point));
  const float in_bounds = min_of(high, max_of(low, in_ball));
  return least == least ? in_bounds : least;
}

AFD_HOST_DEVICE float apgd_step_element(float x_adv, float x_adv_old, float x, float sign, float step, float eps,
                                        float a, float rest, float low, float high) {
  const float least = x - eps, most = x + eps;
  const float z = apgd_project_element(x_adv + step * sign, least, most, low, high);
  const float mixed = x_adv + a * (z - x_adv) + rest * (x_adv - x_adv_old);
  return apgd_project_element(mixed, least, most, low, high);
}

namespace cpu {
void apgd_step(const ApgdStep& args, Launch launch);
}
namespace cuda {
int apgd_step(const ApgdStep& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
