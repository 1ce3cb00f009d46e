// One error for each sanitizer, in a kernel named like ours: where these go unseen, the tool or its filter is not at
// work.
#include <cstdio>

namespace afd::cuda {

__global__ void planted(int* past_the_end, int* sum) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  sum[threadIdx.x] = shared[63 - threadIdx.x];  // racecheck: another warp's, without a barrier
  if (threadIdx.x == 0) past_the_end[0] = 1;    // memcheck: outside of the allocation
}

}  // namespace afd::cuda

int main() {
  int* memory = nullptr;
  if (cudaMalloc(&memory, 64 * sizeof(int)) != cudaSuccess) return 1;
  afd::cuda::planted<<<1, 64>>>(memory + 64, memory);
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
