// L-infinity PGD step on the GPU: 16 bytes an element (float32 gradients), bound by memory bandwidth. A thread takes
// four neighbouring elements of one sample with one 16-byte access a tensor; where a sample's length or a pointer does
// not allow that, one element. The division that finds the sample is hidden behind the loads.

#include "afd/pgd_step.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};

template <class Grad, int kWidth>
__global__ void __launch_bounds__(kThreads) pgd_step_kernel(const PgdStep a) {
  using Floats = Pack<float, kWidth>;
  using Grads = Pack<typename Grad::type, kWidth>;
  const int64_t per_sample = a.elements / kWidth, packs = a.samples * per_sample;
  for (int64_t p = first_item(); p < packs; p += item_stride()) {
    const Floats x_adv = reinterpret_cast<const Floats*>(a.x_adv)[p];
    const Floats x = reinterpret_cast<const Floats*>(a.x)[p];
    const Grads grad = static_cast<const Grads*>(a.grad)[p];
    const int64_t sample = p / per_sample;
    const float alpha = at(a.alpha, sample), eps = at(a.eps, sample);
    Floats out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      out.v[k] = pgd_step_element(x_adv.v[k], x.v[k], Grad::sign(grad.v[k]), alpha, eps, a.low, a.high);
    reinterpret_cast<Floats*>(a.out)[p] = out;
  }
}

template <class Grad>
void launch_for(const PgdStep& a, cudaStream_t stream) {
  const bool wide =
      a.elements % 4 == 0 && aligned16(a.x_adv) && aligned16(a.x) && aligned16(a.grad) && aligned16(a.out);
  const int64_t items = a.samples * a.elements / (wide ? 4 : 1);
  if (wide)
    pgd_step_kernel<Grad, 4><<<blocks_for(items), kThreads, 0, stream>>>(a);
  else
    pgd_step_kernel<Grad, 1><<<blocks_for(items), kThreads, 0, stream>>>(a);
}

}  // namespace

int pgd_step(const PgdStep& args, Launch launch) {
  PgdStep a = args;
  if (!a.alpha.values && !a.eps.values) {  // no per-sample settings: the batch is one long sample
    a.elements *= a.samples;
    a.samples = 1;
  }
  if (a.samples == 0 || a.elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  switch (a.grad_dtype) {
    case DType::f32:
      launch_for<GradF32>(a, stream_of(launch));
      break;
    case DType::f16:
      launch_for<GradF16>(a, stream_of(launch));
      break;
    case DType::bf16:
      launch_for<GradBF16>(a, stream_of(launch));
      break;
  }
  return cudaGetLastError();
}

}  // namespace afd::cuda
