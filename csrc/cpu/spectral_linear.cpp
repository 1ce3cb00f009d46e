// The passes around a spectral layer's matrix products on the CPU. Forward: 8 bytes an element, in place. Backward:
// reads dy and y and writes d / sigma, 12 bytes an element; the sums over samples stay in the nearest cache. Threads
// share the samples. Compiled once per instruction set (AFD_ISA).

#include "afd/spectral_linear.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"

namespace afd::cpu::AFD_ISA {
namespace {

void finish_sample(float* out, const float* bias, int64_t rows, float inverse, float slope) {
#pragma omp simd
  for (int64_t j = 0; j < rows; ++j) out[j] = spectral_out(out[j], inverse, bias[j], slope);
}

void finish_sample(float* out, int64_t rows, float inverse, float slope) {
#pragma omp simd
  for (int64_t j = 0; j < rows; ++j) out[j] = spectral_out(out[j], inverse, 0.0f, slope);
}

void pass_sample(const SpectralLinearBackward& args, int64_t sample, float inverse, float* bias_share, float* c_share) {
  const int64_t rows = args.rows;
  const float* grad = args.grad + sample * rows;
  const float* out = args.out + sample * rows;
  const float* bias = args.bias;
  float* scaled = args.scaled + sample * rows;
  const float slope = args.slope, steepness = 1.0f / slope;
  const auto element = [=](int64_t j, float b) __attribute__((always_inline)) {
    const SpectralTerms terms = spectral_terms(grad[j], out[j], b, slope, steepness);
    scaled[j] = terms.d * inverse;
    bias_share[j] += terms.d;
    c_share[j] += terms.term;
  };
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j) element(j, bias[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j) element(j, 0.0f);
  }
}

}  // namespace

void spectral_linear(const SpectralLinear& args, int threads) {
  const float inverse = 1.0f / *args.sigma;
  for_each_row(threads, args.samples, args.rows, [&args, inverse](int64_t sample) {
    float* out = args.out + sample * args.rows;
    if (args.bias)
      finish_sample(out, args.bias, args.rows, inverse, args.slope);
    else
      finish_sample(out, args.rows, inverse, args.slope);
  });
}

void spectral_linear_backward(const SpectralLinearBackward& args, int threads) {
  const float sigma = *args.sigma, inverse = 1.0f / sigma;
  const int64_t rows = args.rows, each = band_samples(args.samples);
  const int bands = sample_bands(args.samples);
  for_each_row(threads, bands, each * rows, [&](int64_t band) {
    float* bias_share = args.workspace + band * 2 * rows;
    float* c_share = bias_share + rows;
    for (int64_t j = 0; j < 2 * rows; ++j) bias_share[j] = 0.0f;
    const int64_t first = band * each, end = first + each < args.samples ? first + each : args.samples;
    for (int64_t sample = first; sample < end; ++sample) pass_sample(args, sample, inverse, bias_share, c_share);
  });
  for (int64_t j = 0; j < rows; ++j) args.bias_grad[j] = args.workspace[j];
  double c = sum_of(rows, [&args, rows](int64_t j) { return static_cast<double>(args.workspace[rows + j]); });
  for (int band = 1; band < bands; ++band) {
    const float* share = args.workspace + band * 2 * rows;
    for (int64_t j = 0; j < rows; ++j) args.bias_grad[j] += share[j];
    c += sum_of(rows, [share, rows](int64_t j) { return static_cast<double>(share[rows + j]); });
  }
  const float factor = static_cast<float>(-c / sigma);
  for (int64_t i = 0; i < rows; ++i) args.u_scaled[i] = factor * args.u[i];
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(spectral_linear, SpectralLinear)
AFD_CPU_KERNEL(spectral_linear_backward, SpectralLinearBackward)
