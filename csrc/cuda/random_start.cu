// Random start on the GPU: 8 bytes an element. In Linf a thread draws one Philox block and moves the four elements it
// serves with one 16-byte access each way, or one by one where the sample does not begin on a 16-byte boundary. In L2
// and L1 one block takes a sample: its draws go to out while their sum is taken, and are scaled there by the threads
// that drew them.

#include "cuda/random_start.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) linf_kernel(const RandomStart a) {
  const uint64_t seed = a.seed;
  for (int64_t sample = first_row(); sample < a.samples; sample += row_stride())
    put(start_block(a, seed, sample, at(a.eps, sample), own_pack()));
}

template <class Ball>
__global__ void __launch_bounds__(1024) ball_kernel(const RandomStart a) {
  for (int64_t row = blockIdx.x; row < a.samples; row += gridDim.x) {
    const uint64_t sample = a.first_sample + static_cast<uint64_t>(row);
    const float* x = a.x + row * a.elements;
    float* out = a.out + row * a.elements;
    const int64_t blocks = (a.elements + 3) / 4;
    double sum = 0.0;
    for_own(blocks, [&](int64_t block) {
      const Philox drawn = philox_at(a.seed, sample, static_cast<uint32_t>(block), kRandomStartStream);
      const TwoFloats front = Ball::draw(drawn.v0, drawn.v1), back = Ball::draw(drawn.v2, drawn.v3);
      const float draws[4] = {front.first, front.second, back.first, back.second};
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t i = 4 * block + lane;
        if (i >= a.elements) continue;
        out[i] = draws[lane];
        sum += Ball::term(draws[lane]);
      }
    });
    const double extra = Ball::extra(philox_at(a.seed, sample, 0, kRandomStartExtraStream));
    const float scale = Ball::scale(at(a.eps, row), block_sum(sum) + extra);
    for_own(blocks, [&](int64_t block) {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t i = 4 * block + lane;
        if (i < a.elements) out[i] = random_start_element(x[i], out[i], scale, a.low, a.high);
      }
    });
  }
}

void launch_linf(const RandomStart& a, cudaStream_t stream) {
  const Grid grid = random_start_grid(a);
  linf_kernel<<<blocks_of(grid), threads_of(grid), 0, stream>>>(a);
}

template <class Ball>
void launch_ball(const RandomStart& a, cudaStream_t stream) {
  ball_kernel<Ball><<<row_blocks(a.samples), row_threads(a.elements), 0, stream>>>(a);
}

}  // namespace

int random_start(const RandomStart& a, Launch launch) {
  if (a.samples == 0 || a.elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  if (a.norm == Norm::l2)
    launch_ball<BallL2>(a, stream_of(launch));
  else if (a.norm == Norm::l1)
    launch_ball<BallL1>(a, stream_of(launch));
  else
    launch_linf(a, stream_of(launch));
  return cudaGetLastError();
}

}  // namespace afd::cuda
