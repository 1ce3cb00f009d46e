// Loading a batch on the GPU: it reads a byte and writes a float an element, 5 bytes in all.
//
// A block takes rows of one plane (with channels_last: of one image, whose rows hold all channels). Its first thread
// finds the window for all of them, and together they divide the 256 values of a byte by the scale, once. A thread
// writes four neighbouring elements with one 16-byte access; at the ends of a row that does not begin or end on a
// 16-byte boundary, those it has, one by one. It reads their bytes one by one: a window's rows begin at any byte, and
// what neighbouring threads read the cache puts together. With channels_last it divides once for its four elements, to
// find pixel and channel; else never. See cuda/load_batch.h.

#include "cuda/load_batch.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

template <bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) load_batch_kernel(const LoadBatch a, int64_t layers) {
  __shared__ Layer layer;
  __shared__ Scaled scaled;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int value = thread; value < 256; value += threads)
    scaled.of[value] = scaled_pixel(static_cast<uint8_t>(value), a.scale);
  for (int64_t l = blockIdx.z; l < layers; l += gridDim.z) {
    __syncthreads();  // the readers of the layer before are done
    if (thread == 0) layer = layer_of(a, l);
    __syncthreads();
    float* out = a.out + l * a.height * row_length(a);
    for (int64_t row = first_row(); row < a.height; row += row_stride())
      put(load_pack<kChannelsLast>(a, layer, scaled, row, out + row * row_length(a), own_pack()));
  }
}

}  // namespace

int load_batch(const LoadBatch& batch, Launch launch) {
  const LoadBatch a = in_long_rows(batch);
  const int64_t layers = layers_of(a);
  if (layers * a.height * row_length(a) == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  const Grid grid = load_batch_grid(a);
  const auto kernel = a.channels_last ? load_batch_kernel<true> : load_batch_kernel<false>;
  kernel<<<blocks_of(grid), threads_of(grid), 0, stream_of(launch)>>>(a, layers);
  return cudaGetLastError();
}

}  // namespace afd::cuda
