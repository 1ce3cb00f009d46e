// The passes around a spectral layer's matrix products on the GPU, bound by memory: 8 bytes an element forward, 12
// back.
//
// Forward: a thread keeps its column's bias and walks down the samples. Backward: a block takes 32 columns of one band
// of samples, a warp every eighth sample; the warps' sums are added in their order and left in the workspace. A second
// launch of one block adds up the bands and makes db and u's multiple. sigma is read from the device: nothing waits for
// it.

#include "afd/spectral_linear.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

unsigned columns_in(int64_t rows, int64_t each) { return static_cast<unsigned>((rows + each - 1) / each); }

__global__ void __launch_bounds__(kThreads) finish_kernel(const SpectralLinear args) {
  const int64_t j = first_item();
  if (j >= args.rows) return;
  const float inverse = 1.0f / *args.sigma, bias = args.bias ? args.bias[j] : 0.0f;
  for (int64_t i = blockIdx.y; i < args.samples; i += gridDim.y) {
    float* out = args.out + i * args.rows + j;
    *out = spectral_out(*out, inverse, bias, args.slope);
  }
}

__global__ void __launch_bounds__(kThreads) pass_kernel(const SpectralLinearBackward args) {
  __shared__ float shares[2][kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t j = int64_t{blockIdx.x} * 32 + lane, band = blockIdx.y, each = band_samples(args.samples);
  const int64_t end = (band + 1) * each < args.samples ? (band + 1) * each : args.samples;
  float d = 0.0f, c = 0.0f;
  if (j < args.rows) {
    const float inverse = 1.0f / *args.sigma, bias = args.bias ? args.bias[j] : 0.0f, steepness = 1.0f / args.slope;
    for (int64_t i = band * each + warp; i < end; i += kWarps) {
      const int64_t at = i * args.rows + j;
      const SpectralTerms terms = spectral_terms(args.grad[at], args.out[at], bias, args.slope, steepness);
      args.scaled[at] = terms.d * inverse;
      d += terms.d;
      c += terms.term;
    }
  }
  shares[0][warp][lane] = d;
  shares[1][warp][lane] = c;
  __syncthreads();
  if (warp > 1 || j >= args.rows) return;
  float sum = 0.0f;
  for (int other = 0; other < kWarps; ++other) sum += shares[warp][other][lane];
  args.workspace[(band * 2 + warp) * args.rows + j] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const SpectralLinearBackward args) {
  const int bands = sample_bands(args.samples);
  double c = 0.0;
  for_own(args.rows, [&](int64_t j) {
    float sum = 0.0f;
    for (int band = 0; band < bands; ++band) {
      sum += args.workspace[band * 2 * args.rows + j];
      c += static_cast<double>(args.workspace[(band * 2 + 1) * args.rows + j]);
    }
    args.bias_grad[j] = sum;
  });
  const float factor = static_cast<float>(-block_sum(c) / *args.sigma);
  for_own(args.rows, [&](int64_t i) { args.u_scaled[i] = factor * args.u[i]; });
}

}  // namespace

int spectral_linear(const SpectralLinear& args, Launch launch) {
  if (const cudaError_t error = enter(launch)) return error;
  const dim3 blocks(columns_in(args.rows, kThreads), static_cast<unsigned>(args.samples < 1024 ? args.samples : 1024));
  finish_kernel<<<blocks, kThreads, 0, stream_of(launch)>>>(args);
  return cudaGetLastError();
}

int spectral_linear_backward(const SpectralLinearBackward& args, Launch launch) {
  if (const cudaError_t error = enter(launch)) return error;
  const dim3 blocks(columns_in(args.rows, 32), static_cast<unsigned>(sample_bands(args.samples)));
  pass_kernel<<<blocks, kThreads, 0, stream_of(launch)>>>(args);
  if (const cudaError_t error = cudaGetLastError()) return error;
  sum_kernel<<<1, kThreads, 0, stream_of(launch)>>>(args);
  return cudaGetLastError();
}

}  // namespace afd::cuda
