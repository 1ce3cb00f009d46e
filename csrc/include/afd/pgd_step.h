// One step of projected gradient ascent (Madry et al. 2018), then the projection of project.h. Per sample:
//
//     Linf   x_adv + alpha * sign(grad)
//     L2     x_adv + alpha * grad / |grad|_2, or x_adv where the gradient is zero
//     L1     x_adv + alpha / moved * sign(grad) on the `moved` elements with the largest |grad|: k = max(1,
//            round(sparsity * elements)) of them, more if several tie for the last place, none that is zero (Croce &
//            Hein, "Mind the box", ICML 2021)
//
// sign(0) and sign(NaN) are 0, as in torch.sign; in L2 a NaN counts as 0 and an infinity as the largest float, as in
// torch.nan_to_num. |grad|_2 is summed in double, whose range holds the square of every float: no gradient, however
// small or large, needs scaling. (The CPU kernel works in float where a sample's gradient allows it.)
#pragma once

#include <cmath>

#include "afd/common.h"
#include "afd/project.h"

namespace afd {

// The share of elements that an L1 step moves.
struct Sparsity {
  const float* values;  // per sample, or null: `value` serves every sample
  double value;
};

struct PgdStep {
  const float* x_adv;  // [samples, elements]
  const float* x;      // same
  const void* grad;    // same, of grad_dtype
  float* out;          // same; may be x_adv itself
  DType grad_dtype;
  int64_t samples, elements;
  PerSample alpha, eps;
  float low, high;
  Norm norm;
  Sparsity sparsity;
  double* workspace;  // CUDA only: see cuda::l2_workspace
};

// --- What a step reads of a gradient, by its dtype -------------------------------------------------------------------

AFD_HOST_DEVICE float sign_of(float g) { return static_cast<float>((g > 0.0f) - (g < 0.0f)); }

AFD_HOST_DEVICE float finite_of(float g) {
  const float bounded = clamped(g, -kLargestFloat, kLargestFloat);
  return bounded == bounded ? bounded : 0.0f;
}

// The sign of a 16-bit float needs only its bits; `infinity` is the type's +inf pattern, above which lies NaN.
AFD_HOST_DEVICE float sign_of_bits(uint16_t bits, uint16_t infinity) {
  const int magnitude = bits & 0x7fff;
  const int nonzero = (magnitude != 0) & (magnitude <= infinity);
  return static_cast<float>(nonzero * (1 - 2 * (bits >> 15)));
}

// Each type gives the sign; the value as it is; the value made finite; and the key, which ascends with the magnitude
// and is 0 for NaN.
struct GradF32 {
  using type = float;
  AFD_HOST_DEVICE float sign(float g) { return sign_of(g); }
  AFD_HOST_DEVICE float raw(float g) { return g; }
  AFD_HOST_DEVICE float value(float g) { return finite_of(g); }
  AFD_HOST_DEVICE int32_t key(float g) {
    const int32_t magnitude = bits_of(g) & 0x7fffffff;
    return magnitude <= 0x7f800000 ? magnitude : 0;
  }
};
struct GradF16 {
  using type = uint16_t;
  AFD_HOST_DEVICE float sign(uint16_t g) { return sign_of_bits(g, 0x7c00); }
  AFD_HOST_DEVICE float raw(uint16_t g) { return value(g); }
  AFD_HOST_DEVICE float value(uint16_t g) {
    const int32_t magnitude = g & 0x7fff;
    const float normal = float_of((magnitude << 13) + (112 << 23));  // the same mantissa with float's exponent bias
    const float denormal = static_cast<float>(magnitude) * (1.0f / (1 << 24));
    const float finite = magnitude < 0x0400 ? denormal : magnitude < 0x7c00 ? normal : kLargestFloat;
    return finite * sign(g);
  }
  AFD_HOST_DEVICE int32_t key(uint16_t g) { return (g & 0x7fff) <= 0x7c00 ? g & 0x7fff : 0; }
};
struct GradBF16 {
  using type = uint16_t;
  AFD_HOST_DEVICE float sign(uint16_t g) { return sign_of_bits(g, 0x7f80); }
  AFD_HOST_DEVICE float raw(uint16_t g) { return float_of(static_cast<int32_t>(uint32_t{g} << 16)); }
  AFD_HOST_DEVICE float value(uint16_t g) { return finite_of(raw(g)); }
  AFD_HOST_DEVICE int32_t key(uint16_t g) { return (g & 0x7fff) <= 0x7f80 ? g & 0x7fff : 0; }
};

// --- The steps -------------------------------------------------------------------------------------------------------

AFD_HOST_DEVICE float pgd_step_element(float x_adv, float x, float sign, float alpha, float eps, float low,
                                       float high) {
  return project_linf_element(x_adv + alpha * sign, x, eps, low, high);
}

// alpha / |grad|_2 from sum(grad * grad).
AFD_HOST_DEVICE double l2_stride(double squares, float alpha) {
  return squares > 0.0 ? alpha / sqrt(squares) : alpha * 0.0;
}

template <class Real>
AFD_HOST_DEVICE float l2_stepped(float x_adv, float grad, Real stride) {
  return x_adv + static_cast<float>(stride * static_cast<Real>(grad));
}

// How many elements an L1 step moves if none tie.
AFD_HOST_DEVICE int64_t count_to_move(const Sparsity& sparsity, int64_t sample, int64_t elements) {
  const double share = sparsity.values ? static_cast<double>(sparsity.values[sample]) : sparsity.value;
  const double count = rint(share * static_cast<double>(elements));
  return count >= 1.0 ? count < static_cast<double>(elements) ? static_cast<int64_t>(count) : elements : 1;
}

AFD_HOST_DEVICE float l1_stepped(float x_adv, float sign, bool moves, float stride) {
  return moves ? x_adv + stride * sign : x_adv;
}

namespace cpu {
void pgd_step(const PgdStep& args, Launch launch);
}
namespace cuda {
int pgd_step(const PgdStep& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
