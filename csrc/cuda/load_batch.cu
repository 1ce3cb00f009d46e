// Loading a batch on the GPU: it reads a byte and writes a float an element, 5 bytes in all. A thread writes four
// neighbouring elements of one sample with one 16-byte access, or one element where a sample's length or the pointer
// does not allow that. Neighbouring threads read neighbouring bytes, which the cache puts together: a window's rows
// begin at any byte, so wide reads would not line up.

#include "afd/load_batch.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

template <int kWidth>
__global__ void __launch_bounds__(kThreads) load_batch_kernel(const LoadBatch a) {
  const int64_t elements = a.channels * a.height * a.width, per_sample = elements / kWidth;
  for (int64_t p = first_item(); p < a.samples * per_sample; p += item_stride()) {
    const int64_t sample = p / per_sample;
    const Window window = window_of(a, sample);
    Pack<float, kWidth> loaded;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int64_t i = (p % per_sample) * kWidth + k;
      const int64_t inner = a.channels_last ? a.channels : a.width;  // of [.., middle, inner], as the sample lies
      const int64_t middle = a.channels_last ? a.width : a.height;
      const int64_t first = i / inner / middle, second = i / inner % middle, third = i % inner;
      loaded.v[k] =
          a.channels_last ? load_pixel(a, window, third, first, second) : load_pixel(a, window, first, second, third);
    }
    reinterpret_cast<Pack<float, kWidth>*>(a.out)[p] = loaded;
  }
}

}  // namespace

int load_batch(const LoadBatch& a, Launch launch) {
  const int64_t elements = a.channels * a.height * a.width;
  if (a.samples == 0 || elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  if (elements % 4 == 0 && aligned16(a.out))
    load_batch_kernel<4><<<blocks_for(a.samples * elements / 4), kThreads, 0, stream_of(launch)>>>(a);
  else
    load_batch_kernel<1><<<blocks_for(a.samples * elements), kThreads, 0, stream_of(launch)>>>(a);
  return cudaGetLastError();
}

}  // namespace afd::cuda
