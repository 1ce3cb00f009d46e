// Random start on the GPU: 8 bytes an element. A thread draws one Philox block and writes the four elements it serves.

#include "afd/random_start.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) random_start_kernel(const RandomStart a) {
  const int64_t per_sample = (a.elements + 3) / 4, blocks = a.samples * per_sample;
  for (int64_t b = first_item(); b < blocks; b += item_stride()) {
    const int64_t sample = b / per_sample, block = b % per_sample;
    const Philox drawn = philox_at(a.seed, a.first_sample + static_cast<uint64_t>(sample), static_cast<uint32_t>(block),
                                   kRandomStartStream);
    const float eps = at(a.eps, sample);
    const float* x = a.x + sample * a.elements;
    float* out = a.out + sample * a.elements;
    const uint32_t lanes[4] = {drawn.v0, drawn.v1, drawn.v2, drawn.v3};
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t i = 4 * block + lane;
      if (i < a.elements) out[i] = random_start_element(x[i], symmetric_uniform(lanes[lane]), eps, a.low, a.high);
    }
  }
}

}  // namespace

int random_start(const RandomStart& a, Launch launch) {
  if (a.samples == 0 || a.elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  const int64_t blocks = a.samples * ((a.elements + 3) / 4);
  random_start_kernel<<<blocks_for(blocks), kThreads, 0, stream_of(launch)>>>(a);
  return cudaGetLastError();
}

}  // namespace afd::cuda
