// Projection on the GPU: 12 bytes an element, bound by memory bandwidth. Linf is elementwise. In L2 and L1 one block
// takes a sample; where it fits, it is read once into shared memory and the passes run there. A larger sample is walked
// in place by one large block in L1 (about six passes, mostly in the L2 cache), and by two launches of many blocks in
// L2.

#include "afd/project.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

template <int kWidth>
__global__ void __launch_bounds__(kThreads) project_linf_kernel(const Project a) {
  using Floats = Pack<float, kWidth>;
  const int64_t per_sample = a.elements / kWidth, packs = a.samples * per_sample;
  for (int64_t p = first_item(); p < packs; p += item_stride()) {
    const Floats x_adv = reinterpret_cast<const Floats*>(a.x_adv)[p];
    const Floats x = reinterpret_cast<const Floats*>(a.x)[p];
    const float eps = at(a.eps, p / per_sample);
    Floats out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.v[k] = project_linf_element(x_adv.v[k], x.v[k], eps, a.low, a.high);
    reinterpret_cast<Floats*>(a.out)[p] = out;
  }
}

template <Norm kNorm>
__global__ void __launch_bounds__(1024) project_row_kernel(const Project a, bool on_chip) {
  extern __shared__ float chip[];
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const float* x_adv = a.x_adv + sample * a.elements;
    const float* x = a.x + sample * a.elements;
    float* out = a.out + sample * a.elements;
    if (on_chip) {
      for_own(a.elements, [&](int64_t i) {
        chip[i] = x_adv[i];
        chip[a.elements + i] = x[i];
      });
      x_adv = chip;
      x = chip + a.elements;
    }
    project_row<kNorm>(x_adv, x, out, a.elements, at(a.eps, sample), a.low, a.high);
  }
}

__global__ void __launch_bounds__(kThreads) l2_measure_kernel(const Project a, int chunks) {
  const Share share = share_of(a.elements, chunks);
  Moments own = {0.0, 0.0, 0.0};
  for_own(share.count, [&](int64_t i) {
    const double u = a.x_adv[share.first + i] - a.x[share.first + i];
    own.uu += u * u;
  });
  keep_moments(own, a.workspace);
}

__global__ void __launch_bounds__(kThreads) l2_write_kernel(const Project a, int chunks) {
  const Share share = share_of(a.elements, chunks);
  const float factor = l2_factor(kept_moments(share.sample, chunks, a.workspace).uu, at(a.eps, share.sample));
  write_l2(a.x_adv + share.first, a.x + share.first, a.out + share.first, share.count, factor, a.low, a.high);
}

void project_linf(const Project& a, cudaStream_t stream) {
  const bool wide = a.elements % 4 == 0 && aligned16(a.x_adv) && aligned16(a.x) && aligned16(a.out);
  if (wide)
    project_linf_kernel<4><<<blocks_for(a.samples * a.elements / 4), kThreads, 0, stream>>>(a);
  else
    project_linf_kernel<1><<<blocks_for(a.samples * a.elements), kThreads, 0, stream>>>(a);
}

template <Norm kNorm>
void project_rows(const Project& a, cudaStream_t stream) {
  project_row_kernel<kNorm>
      <<<row_blocks(a.samples), row_threads(a.elements), row_memory(a.elements), stream>>>(a, fits_on_chip(a.elements));
}

void project_l2_in_chunks(const Project& a, cudaStream_t stream) {
  const int chunks = chunks_of(a.elements);
  const auto blocks = static_cast<unsigned>(a.samples * chunks);
  l2_measure_kernel<<<blocks, kThreads, 0, stream>>>(a, chunks);
  l2_write_kernel<<<blocks, kThreads, 0, stream>>>(a, chunks);
}

}  // namespace

int64_t l2_workspace(int64_t samples, int64_t elements) {
  return fits_on_chip(elements) ? 0 : samples * chunks_of(elements) * int64_t{sizeof(Moments) / sizeof(double)};
}

int project(const Project& a, Launch launch) {
  if (a.samples == 0 || a.elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  if (a.norm == Norm::linf)
    project_linf(a, stream_of(launch));
  else if (a.norm == Norm::l1)
    project_rows<Norm::l1>(a, stream_of(launch));
  else if (fits_on_chip(a.elements))
    project_rows<Norm::l2>(a, stream_of(launch));
  else
    project_l2_in_chunks(a, stream_of(launch));
  return cudaGetLastError();
}

}  // namespace afd::cuda
