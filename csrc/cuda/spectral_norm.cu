// The power iteration of a whole group on the GPU: one launch an iteration, and no more than the weights are read.
//
// A block takes one band of one matrix (spectral_norm.h): a warp meets a row with v, adds its lanes up, and adds the
// row, weighted by the product, to its own share of Wt t in shared memory, while the row is still in the nearest cache.
// The block leaves the sum of its warps' shares in the workspace and counts itself. The block that finds itself the
// last of its matrix adds the bands' shares in their order and sets u, v and sigma: no block waits for another, and the
// result does not depend on which one is the last.
//
// The order in which v comes first, and matrices whose products leave float's range, go one block a matrix, scaled
// (`careful`). The counters are set to zero ahead of the first launch, on its stream; each launch leaves them so.

#include "afd/spectral_norm.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

constexpr int kMatrices = 16;  // a launch; larger groups take several
constexpr int kWarps = kThreads / 32;
constexpr int64_t kColumnsShared = 1024;  // of a warp's share; wider matrices go in pieces

struct Slot {
  SpectralMatrix m;
  float* sigma;
  float* workspace;
  unsigned* counter;
  int first_block;
};

struct Slots {
  Slot of[kMatrices];
  int count;
  float eps;
};

__device__ double squares_of(const float* vector, int64_t count) {
  return sum_of(count, [=](int64_t i) { return static_cast<double>(vector[i]) * static_cast<double>(vector[i]); });
}

__device__ void scaled_into(float* out, const float* vector, int64_t count, double factor) {
  for_own(count, [=](int64_t i) { out[i] = static_cast<float>(static_cast<double>(vector[i]) * factor); });
}

// --- One block, one matrix, unhurried --------------------------------------------------------------------------------

__device__ void multiply_v(const SpectralMatrix& m, float* products, float* scaled, float scale) {
  scaled_into(scaled, m.v_out, m.columns, scale);
  __syncthreads();
  for (int64_t row = threadIdx.x / 32; row < m.rows; row += blockDim.x / 32) {
    const float* w = m.weight + row * m.columns;
    float sum = 0.0f;
    for (int64_t j = threadIdx.x % 32; j < m.columns; j += 32) sum += w[j] * scaled[j];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) products[row] = sum;
  }
  __syncthreads();
}

__device__ void multiply_u(const SpectralMatrix& m, float* scaled, float* sums, float scale) {
  scaled_into(scaled, m.u_out, m.rows, scale);
  __syncthreads();
  for_own(m.columns, [&](int64_t j) {
    float sum = 0.0f;
    for (int64_t row = 0; row < m.rows; ++row) sum += m.weight[row * m.columns + j] * scaled[row];
    sums[j] = sum;
  });
  __syncthreads();
}

__device__ void follow(float* vector, const float* successor, int64_t count, float scale, float eps) {
  const double length = sqrt(squares_of(successor, count));
  if (length / scale > eps) scaled_into(vector, successor, count, 1.0 / length);
  __syncthreads();
}

__device__ void careful(const SpectralMatrix& m, float* workspace, int n_iter, bool u_first, float eps, float* sigma) {
  float largest = 0.0f;
  for_own(m.rows * m.columns, [&](int64_t i) { largest = max_of(fabsf(m.weight[i]), largest); });
  const float scale = power_that_scales(block_max(largest));
  float *products = workspace, *sums = workspace + m.rows;
  for (int i = 0; i < n_iter; ++i) {
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == u_first) {
        multiply_v(m, products, sums, scale);
        follow(m.u_out, products, m.rows, scale, eps);
      } else {
        multiply_u(m, products, sums, scale);
        follow(m.v_out, sums, m.columns, scale, eps);
      }
    }
  }
  multiply_v(m, products, sums, scale);
  const double sum =
      sum_of(m.rows, [&](int64_t i) { return static_cast<double>(m.u_out[i]) * static_cast<double>(products[i]); });
  if (threadIdx.x == 0) *sigma = kept_sigma(sum / scale, eps);
}

__global__ void __launch_bounds__(kThreads) careful_kernel(const Slots slots, int n_iter, bool u_first) {
  const Slot& slot = slots.of[blockIdx.x];
  for_own(slot.m.rows, [&](int64_t i) { slot.m.u_out[i] = slot.m.u[i]; });
  for_own(slot.m.columns, [&](int64_t j) { slot.m.v_out[j] = slot.m.v[j]; });
  __syncthreads();
  careful(slot.m, slot.workspace, n_iter, u_first, slots.eps, slot.sigma);
}

// --- The group, in one pass an iteration -----------------------------------------------------------------------------

// t = W v in the rows of this block's band, and the band's share of Wt t.
template <bool kMoves>
__device__ void pass_band(const SpectralMatrix& m, const float* v, int band, float* workspace) {
  __shared__ float shares[kWarps][kColumnsShared];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t each = band_rows(m.rows, m.columns), first = band * each;
  const int64_t end = first + each < m.rows ? first + each : m.rows;
  for (int64_t row = first + warp; row < end; row += kWarps) {
    const float* w = m.weight + row * m.columns;
    float sum = 0.0f;
    for (int64_t j = lane; j < m.columns; j += 32) sum += w[j] * v[j];
    sum = warp_sum(sum);
    if (lane == 0) workspace[row] = sum;
  }
  if (!kMoves) return;
  __syncthreads();
  float* share = workspace + m.rows + band * m.columns;
  for (int64_t piece = 0; piece < m.columns; piece += kColumnsShared) {
    const int64_t width = m.columns - piece < kColumnsShared ? m.columns - piece : kColumnsShared;
    for (int64_t j = lane; j < width; j += 32) {
      float sum = 0.0f;
      for (int64_t row = first + warp; row < end; row += kWarps)
        sum += m.weight[row * m.columns + piece + j] * workspace[row];
      shares[warp][j] = sum;
    }
    __syncthreads();
    for_own(width, [&](int64_t j) {
      float sum = 0.0f;
      for (int other = 0; other < kWarps; ++other) sum += shares[other][j];
      share[piece + j] = sum;
    });
    __syncthreads();
  }
}

// Whether this block is the last of its matrix's; if so, it sees what the others left.
__device__ bool last_of(unsigned* counter, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  const auto all_but_one = static_cast<unsigned>(blocks - 1);
  if (threadIdx.x == 0) last = atomicInc(counter, all_but_one) == all_but_one;  // then back to 0, for the next launch
  __syncthreads();
  if (last) __threadfence();
  return last;
}

__device__ void begin_careful(const Slot& slot, const float* u, const float* v) {
  if (u != slot.m.u_out) for_own(slot.m.rows, [&](int64_t i) { slot.m.u_out[i] = u[i]; });
  if (v != slot.m.v_out) for_own(slot.m.columns, [&](int64_t j) { slot.m.v_out[j] = v[j]; });
  __syncthreads();
}

// What other blocks wrote is read past this SM's own cache, which may hold an older line.
__device__ double squares_past_cache(const float* vector, int64_t count) {
  return sum_of(count, [=](int64_t i) {
    const double value = __ldcg(vector + i);
    return value * value;
  });
}

__device__ void move(const Slot& slot, const float* u, const float* v, float eps) {
  const SpectralMatrix& m = slot.m;
  const int bands = bands_of(m.rows, m.columns);
  float *t = slot.workspace, *a = slot.workspace + m.rows;
  for_own(m.columns, [&](int64_t j) {
    float sum = __ldcg(a + j);
    for (int band = 1; band < bands; ++band) sum += __ldcg(a + band * m.columns + j);
    a[j] = sum;
  });
  const double tt = squares_past_cache(t, m.rows), aa = squares_of(a, m.columns), sigma = sqrt(aa / tt);
  if (!(in_range(tt) && in_range(aa) && sqrt(tt) > eps && sigma > eps)) {
    begin_careful(slot, u, v);
    return careful(m, slot.workspace, 1, true, eps, slot.sigma);
  }
  const double to_u = 1.0 / sqrt(tt), to_v = 1.0 / sqrt(aa);
  for_own(m.rows, [&](int64_t i) { m.u_out[i] = static_cast<float>(static_cast<double>(__ldcg(t + i)) * to_u); });
  scaled_into(m.v_out, a, m.columns, to_v);
  if (threadIdx.x == 0) *slot.sigma = static_cast<float>(sigma);
}

__device__ void stay(const Slot& slot, const float* u, const float* v, float eps) {
  const SpectralMatrix& m = slot.m;
  const float* t = slot.workspace;
  begin_careful(slot, u, v);
  if (!in_range(squares_past_cache(t, m.rows))) return careful(m, slot.workspace, 0, true, eps, slot.sigma);
  const double sum =
      sum_of(m.rows, [&](int64_t i) { return static_cast<double>(u[i]) * static_cast<double>(__ldcg(t + i)); });
  if (threadIdx.x == 0) *slot.sigma = kept_sigma(sum, eps);
}

// With `again`, u and v are where an iteration before left them.
template <bool kMoves>
__global__ void __launch_bounds__(kThreads) sweep_kernel(const Slots slots, bool again) {
  int i = 0;
  while (i + 1 < slots.count && static_cast<int>(blockIdx.x) >= slots.of[i + 1].first_block) ++i;
  const Slot& slot = slots.of[i];
  const float *u = again ? slot.m.u_out : slot.m.u, *v = again ? slot.m.v_out : slot.m.v;
  pass_band<kMoves>(slot.m, v, blockIdx.x - slot.first_block, slot.workspace);
  if (!last_of(slot.counter, bands_of(slot.m.rows, slot.m.columns))) return;
  if (kMoves)
    move(slot, u, v, slots.eps);
  else
    stay(slot, u, v, slots.eps);
}

cudaError_t run(const Slots& slots, int blocks, const SpectralNorm& args, cudaStream_t stream) {
  if (!args.u_first && args.n_iter > 0) {
    careful_kernel<<<slots.count, kThreads, 0, stream>>>(slots, args.n_iter, false);
    return cudaGetLastError();
  }
  for (int i = 0; i == 0 || i < args.n_iter; ++i) {
    if (args.n_iter == 0)
      sweep_kernel<false><<<blocks, kThreads, 0, stream>>>(slots, false);
    else
      sweep_kernel<true><<<blocks, kThreads, 0, stream>>>(slots, i > 0);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

}  // namespace

int spectral_norm(const SpectralNorm& args, Launch launch) {
  if (const cudaError_t error = enter(launch)) return error;
  auto* counters = reinterpret_cast<unsigned*>(args.workspace);  // one a matrix, ahead of all else
  float* workspace = args.workspace + args.count;
  if (const cudaError_t error = cudaMemsetAsync(counters, 0, sizeof(unsigned) * args.count, stream_of(launch)))
    return error;
  for (int begin = 0; begin < args.count; begin += kMatrices) {
    Slots slots{};
    slots.eps = args.eps;
    int blocks = 0;
    for (int i = begin; i < args.count && i < begin + kMatrices; ++i) {
      const SpectralMatrix& m = args.matrices[i];
      slots.of[slots.count++] = {m, args.sigma + i, workspace, counters + i, blocks};
      blocks += bands_of(m.rows, m.columns);
      workspace += spectral_norm_workspace(m.rows, m.columns) - 1;
    }
    if (const cudaError_t error = run(slots, blocks, args, stream_of(launch))) return error;
  }
  return cudaSuccess;
}

}  // namespace afd::cuda
