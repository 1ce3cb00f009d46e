// Launch arithmetic shared by the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "afd/common.h"
#include "cuda/tiles.h"

namespace afd::cuda {

// Python holds torch's device guard; this makes our own (static) runtime agree with it before the launch.
inline cudaError_t enter(const Launch& launch) { return cudaSetDevice(launch.device); }

inline cudaStream_t stream_of(const Launch& launch) { return static_cast<cudaStream_t>(launch.stream); }

// One thread an item while the grid allows it; kernels stride over the rest. 2^20 blocks are far more than any GPU
// holds.
inline unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
}

__device__ __forceinline__ int64_t first_item() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t item_stride() { return int64_t{gridDim.x} * kThreads; }

// The grids of tiles.h, as CUDA takes them: a thread's pack, its first row, and how far its next row is.
inline dim3 blocks_of(const Grid& grid) { return {grid.x, grid.y, grid.z}; }
inline dim3 threads_of(const Grid& grid) { return {grid.threads_x, grid.threads_y}; }

__device__ __forceinline__ int64_t own_pack() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.y} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_stride() { return int64_t{gridDim.y} * blockDim.y; }

}  // namespace afd::cuda
