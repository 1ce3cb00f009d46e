// What the CUDA kernels do with one sample a block: sums, and the projections that project and pgd_step share.
//
// A thread owns every blockDim-th element and is the only one to touch it, so passes over a sample need no barrier but
// those inside the sums. Sums add in an order that the block's size alone decides, and that size follows from the
// sample's length: results do not change from run to run or with the batch. Each thread gets the sum and steers the
// searches by itself: nothing returns to the host.
#pragma once

#include "afd/l1_threshold.h"
#include "afd/project.h"
#include "cuda/launch.cuh"

namespace afd::cuda {

// --- One block a sample ----------------------------------------------------------------------------------------------

// The samples that fit on chip twice over (the point and the image) in the 48 KiB that any GPU grants without asking.
constexpr int64_t kMostOnChip = 5632;

inline bool fits_on_chip(int64_t elements) { return elements <= kMostOnChip; }
inline int row_threads(int64_t elements) { return elements <= 1024 ? 128 : fits_on_chip(elements) ? 256 : 1024; }
inline unsigned row_blocks(int64_t samples) { return static_cast<unsigned>(samples < (1 << 30) ? samples : (1 << 30)); }
inline size_t row_memory(int64_t elements) { return fits_on_chip(elements) ? 2 * sizeof(float) * elements : 0; }

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <class T, class Join>
__device__ T block_join(T value, const Join& join) {
  __shared__ T warps[32];
  for (int offset = 16; offset > 0; offset /= 2) value = join(value, __shfl_down_sync(~0u, value, offset));
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T joined = warps[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) joined = join(joined, warps[warp]);
  return joined;
}

template <class T>
__device__ T block_sum(T value) {
  return block_join(value, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T block_max(T value) {
  return block_join(value, [](T a, T b) { return b > a ? b : a; });
}

// body(i) for each element that this thread owns.
template <class Body>
__device__ void for_own(int64_t count, const Body& body) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) body(i);
}

template <class Term>
__device__ double sum_of(int64_t count, const Term& term) {
  double sum = 0.0;
  for_own(count, [&](int64_t i) { sum += term(i); });
  return block_sum(sum);
}

// --- Projections; `out` may be x_adv ---------------------------------------------------------------------------------

__device__ inline void write_l2(const float* x_adv, const float* x, float* out, int64_t count, float factor, float low,
                                float high) {
  for_own(count, [=](int64_t i) {
    out[i] = factor == 1.0f ? clamped(x_adv[i], low, high) : project_l2_element(x_adv[i], x[i], factor, low, high);
  });
}

__device__ inline void project_l2_row(const float* x_adv, const float* x, float* out, int64_t count, float eps,
                                      float low, float high) {
  const double squares = sum_of(count, [=](int64_t i) {
    const double u = x_adv[i] - x[i];
    return u * u;
  });
  write_l2(x_adv, x, out, count, l2_factor(squares, eps), low, high);
}

__device__ inline void project_l1_row(const float* x_adv, const float* x, float* out, int64_t count, float eps,
                                      float low, float high) {
  double sum = 0.0;
  int64_t sloping = 0;
  float largest = 0.0f;
  for_own(count, [&](int64_t i) {
    const float u = x_adv[i] - x[i], size = fabsf(u), room = l1_room(u, x[i], low, high);
    sum += static_cast<double>(min_of(room, size));  // a NaN passes into the sum
    sloping += l1_term(size, room).sloping;
    largest = max_of(size, largest);
  });
  L1Threshold search(eps, block_sum(sum), block_sum(sloping), block_max(largest));
  while (search.searching()) {
    const L1Cut cut = l1_cut(search.lambda());
    sum = 0.0;
    sloping = 0;
    for_own(count, [&](int64_t i) {
      const L1Term term = l1_term_at(x_adv[i], x[i], cut, low, high);
      sum += static_cast<double>(term.kept);
      sloping += term.sloping;
    });
    search.add(block_sum(sum), block_sum(sloping));
  }
  const double lambda = search.lambda();
  const L1Cut cut = l1_cut(lambda);
  const float bad = lambda == lambda ? 0.0f : static_cast<float>(lambda);
  for_own(count, [=](int64_t i) {
    out[i] = lambda == 0.0 ? clamped(x_adv[i], low, high) : project_l1_element(x_adv[i], x[i], cut, low, high) + bad;
  });
}

template <Norm kNorm>
__device__ void project_row(const float* x_adv, const float* x, float* out, int64_t count, float eps, float low,
                            float high) {
  if (kNorm == Norm::l2)
    project_l2_row(x_adv, x, out, count, eps, low, high);
  else
    project_l1_row(x_adv, x, out, count, eps, low, high);
}

// --- L2 of samples that do not fit on chip: several blocks a sample, two launches ------------------------------------

// The first launch leaves each block's part of a sample's moments in the workspace, the second adds them up and writes.
// With g the gradient and u = x_adv - x, a step of stride s gives |u + s g|^2 = uu + 2 s ug + s^2 gg, so that one pass
// serves both of its norms; a projection needs uu only.
struct Moments {
  double uu, ug, gg;
};

constexpr int64_t kChunk = 4096;  // elements a block, more where that would be more than kThreads blocks a sample

inline int chunks_of(int64_t elements) {
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  return static_cast<int>(chunks < kThreads ? chunks : kThreads);
}

struct Share {
  int64_t sample, first, count;
};

__device__ inline Share share_of(int64_t elements, int chunks) {
  const int64_t sample = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t begin = elements * chunk / chunks, end = elements * (chunk + 1) / chunks;
  return {sample, sample * elements + begin, end - begin};
}

__device__ inline void keep_moments(Moments own, double* workspace) {
  const Moments sum = {block_sum(own.uu), block_sum(own.ug), block_sum(own.gg)};
  if (threadIdx.x == 0) reinterpret_cast<Moments*>(workspace)[blockIdx.x] = sum;
}

__device__ inline Moments kept_moments(int64_t sample, int chunks, const double* workspace) {
  const Moments none = {0.0, 0.0, 0.0};
  const auto* kept = reinterpret_cast<const Moments*>(workspace) + sample * chunks;
  const Moments own = static_cast<int>(threadIdx.x) < chunks ? kept[threadIdx.x] : none;
  return {block_sum(own.uu), block_sum(own.ug), block_sum(own.gg)};
}

}  // namespace afd::cuda
