// An error for each tool of compute-sanitizer, in a kernel named like ours: a tool that does not see it is not at work.
__global__ void afd_planted(int* memory, int* past_the_end) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  memory[threadIdx.x] = shared[63 - threadIdx.x];  // racecheck: another warp's, without a barrier
  if (threadIdx.x == 0) past_the_end[0] = 1;       // memcheck: outside of the allocation
}
int main() {
  int* memory = nullptr;
  if (cudaMalloc(&memory, 128 * sizeof(int)) != cudaSuccess) return 1;
  afd_planted<<<1, 64>>>(memory, memory + 128);
  cudaDeviceSynchronize();  // an error here is what was planted
}
