// Launch arithmetic shared by the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "afd/common.h"

namespace afd::cuda {

constexpr int kThreads = 256;

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

// kWidth neighbours, moved by one access where they are together at most 16 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace afd::cuda
