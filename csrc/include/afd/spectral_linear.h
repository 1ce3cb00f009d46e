// The passes around the matrix products of a spectral-normalised layer, y = act(x Wt / sigma + b), where act(p) is p
// for p > 0 and slope p elsewhere, 0 < slope <= 1.
//
// Forward: torch forms x Wt, and one pass in place does the rest. Backward: from dy and y one pass makes
//
//     d = act'(p) dy,    d / sigma (for torch's two products),    db = sum over samples of d,
//     c = sum over all of d (p - b)    (p follows from y, as act can be undone),
//
// and with c the vector  -(c / sigma) u , whose outer product with v is what sigma adds to dW:
//
//     dx = (d / sigma) W,    dW = (d / sigma)t x - (c / sigma) u vt.
//
// sigma is read where the kernels run: nothing waits for it.
#pragma once

#include "afd/common.h"

namespace afd {

struct SpectralLinear {
  float* out;          // [samples, rows]: x Wt, to become y
  const float* bias;   // [rows], or null
  const float* sigma;  // one number
  int64_t samples, rows;
  float slope;
};

struct SpectralLinearBackward {
  const float* grad;   // [samples, rows]: dy
  const float* out;    // same: y
  const float* bias;   // [rows], or null
  const float* sigma;  // one number
  const float* u;      // [rows]
  float* scaled;       // [samples, rows]: d / sigma
  float* bias_grad;    // [rows]: db
  float* u_scaled;     // [rows]: -(c / sigma) u
  float* workspace;    // spectral_linear_workspace floats
  int64_t samples, rows;
  float slope;
};

// The samples are cut into bands, by their number alone; each leaves its share of db and of c, and the shares are added
// in order.
constexpr int kMostSampleBands = 16;
constexpr int64_t kBandSamples = 16;

AFD_HOST_DEVICE int64_t band_samples(int64_t samples) {
  const int64_t by_count = (samples + kMostSampleBands - 1) / kMostSampleBands;
  return by_count > kBandSamples ? by_count : kBandSamples;
}

AFD_HOST_DEVICE int sample_bands(int64_t samples) {
  return static_cast<int>((samples + band_samples(samples) - 1) / band_samples(samples));
}

// Shares of db and of c's terms, column by column: a band has a row of each.
AFD_HOST_DEVICE int64_t spectral_linear_workspace(int64_t samples, int64_t rows) {
  return sample_bands(samples) * 2 * rows;
}

AFD_HOST_DEVICE float spectral_out(float product, float inverse, float bias, float slope) {
  const float before = product * inverse + bias;
  return before > 0.0f ? before : before * slope;
}

struct SpectralTerms {
  float d;     // the gradient before the activation
  float term;  // of c
};

AFD_HOST_DEVICE SpectralTerms spectral_terms(float grad, float out, float bias, float slope, float steepness) {
  const bool positive = out > 0.0f;
  const float d = positive ? grad : grad * slope;
  const float before = positive ? out : out * steepness;  // steepness is 1 / slope
  return {d, d * (before - bias)};
}

namespace cpu {
void spectral_linear(const SpectralLinear& args, Launch launch);
void spectral_linear_backward(const SpectralLinearBackward& args, Launch launch);
}  // namespace cpu
namespace cuda {
int spectral_linear(const SpectralLinear& args, Launch launch);  // a cudaError_t, as is the next one's result
int spectral_linear_backward(const SpectralLinearBackward& args, Launch launch);
}  // namespace cuda

}  // namespace afd
