// The projection head on the GPU. Forward: a warp a sample, h read once. Backward, three launches: a warp a sample
// writes dh; a block for each strip of w and of every row of e sums g h over the samples that belong to it, in the
// samples' order, so that no two blocks add to one place and equal calls give equal bits; and a block for each of those
// rows takes sigma's share off, which needs all strips. Labels are scanned by every block: 8 bytes a sample, from the
// nearest cache.

#include "afd/projection_logits.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

constexpr int kGroups = kThreads / static_cast<int>(kStrip);  // of samples that a block sums apart

unsigned warps_for(int64_t samples) { return blocks_for(samples * 32); }

// body(sample, lane), a warp a sample.
template <class Body>
__device__ void each_sample(int64_t samples, const Body& body) {
  for (int64_t i = first_item() / 32; i < samples; i += item_stride() / 32) body(i, threadIdx.x % 32);
}

__global__ void __launch_bounds__(kThreads) score_kernel(const ProjectionLogits args) {
  const float to_w = 1.0f / *args.sigma_w, to_e = args.y ? 1.0f / *args.sigma_e : 0.0f;
  each_sample(args.samples, [&](int64_t i, int lane) {
    const float* h = args.h + i * args.width;
    const bool known = args.y && names_a_row(args.y[i], args.classes);
    const float* e = known ? args.e + args.y[i] * args.width : nullptr;
    float of_w = 0.0f, of_e = 0.0f;
    for (int64_t j = lane; j < args.width; j += 32) {
      of_w += h[j] * args.w[j];
      if (e) of_e += h[j] * e[j];
    }
    of_w = warp_sum(of_w);
    of_e = warp_sum(of_e);
    if (args.y && !known) of_e = nanf("");
    if (lane == 0) args.score[i] = of_w * to_w + (args.bias ? *args.bias : 0.0f) + of_e * to_e;
  });
}

__global__ void __launch_bounds__(kThreads) dh_kernel(const ProjectionLogitsBackward args) {
  const float to_w = 1.0f / *args.w.sigma, to_e = args.y ? 1.0f / *args.e.sigma : 0.0f;
  each_sample(args.samples, [&](int64_t i, int lane) {
    const float g = args.grad[i];
    const bool known = args.y && names_a_row(args.y[i], args.classes);
    const float* e = known ? args.e.weight + args.y[i] * args.width : nullptr;
    for (int64_t j = lane; j < args.width; j += 32) {
      const float of_e = e ? g * (e[j] * to_e) : args.y ? nanf("") : 0.0f;
      args.dh[i * args.width + j] = g * (args.w.weight[j] * to_w) + of_e;
    }
  });
}

// Block (row, strip): row 0 is w, row 1 + c is class c of e. Rows go first, for there a grid may be long.
__global__ void __launch_bounds__(kThreads) gather_kernel(const ProjectionLogitsBackward args) {
  __shared__ float shares[kGroups][kStrip];
  const int column = threadIdx.x % kStrip, group = threadIdx.x / kStrip;
  const int64_t row = blockIdx.x, j = int64_t{blockIdx.y} * kStrip + column, label = row - 1;
  const bool inside = j < args.width;
  const int64_t each = (args.samples + kGroups - 1) / kGroups;
  const int64_t end = (group + 1) * each < args.samples ? (group + 1) * each : args.samples;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = group * each; i < end; ++i)
    if (inside && (row == 0 || args.y[i] == label)) sum += args.grad[i] * args.h[i * args.width + j];
  shares[group][column] = sum;
  __syncthreads();
  double product = 0.0;
  if (group == 0 && inside) {
    for (int other = 1; other < kGroups; ++other) sum += shares[other][column];
    const float weight = row == 0 ? args.w.weight[j] : args.e.weight[label * args.width + j];
    (row == 0 ? args.dw[j] : args.de[label * args.width + j]) = sum;
    product = static_cast<double>(sum) * static_cast<double>(weight);
  }
  product = block_sum(product);
  if (threadIdx.x == 0) args.workspace[blockIdx.y * int64_t{gridDim.x} + row] = product;
}

// Block row: as above; block 0 makes db, too.
__global__ void __launch_bounds__(kThreads) take_off_kernel(const ProjectionLogitsBackward args) {
  const int64_t row = blockIdx.x, rows = gridDim.x, strips = strips_of(args.width);
  const Normalised& m = row == 0 ? args.w : args.e;
  const double product =
      sum_of(strips * rows, [&](int64_t i) { return (i % rows == 0) == (row == 0) ? args.workspace[i] : 0.0; });
  const int64_t own = row == 0 ? 0 : row - 1;
  const float sigma = *m.sigma, along = static_cast<float>(product / sigma) * m.u[own], inverse = 1.0f / sigma;
  float* grad = row == 0 ? args.dw : args.de + own * args.width;
  for_own(args.width, [&](int64_t j) { grad[j] = through_sigma(grad[j], along, m.v[j], inverse); });
  if (row > 0) return;
  const double db = sum_of(args.samples, [&](int64_t i) { return static_cast<double>(args.grad[i]); });
  if (threadIdx.x == 0) *args.db = static_cast<float>(db);
}

}  // namespace

int projection_logits(const ProjectionLogits& args, Launch launch) {
  if (const cudaError_t error = enter(launch)) return error;
  score_kernel<<<warps_for(args.samples), kThreads, 0, stream_of(launch)>>>(args);
  return cudaGetLastError();
}

int projection_logits_backward(const ProjectionLogitsBackward& args, Launch launch) {
  if (const cudaError_t error = enter(launch)) return error;
  const cudaStream_t stream = stream_of(launch);
  const auto rows = static_cast<unsigned>(args.y ? args.classes + 1 : 1);
  dh_kernel<<<warps_for(args.samples), kThreads, 0, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError()) return error;
  gather_kernel<<<dim3(rows, static_cast<unsigned>(strips_of(args.width))), kThreads, 0, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError()) return error;
  take_off_kernel<<<rows, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace afd::cuda
