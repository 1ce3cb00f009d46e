// Auto-PGD's momentum step on the GPU: 24 bytes an element (float32 gradients), bound by memory bandwidth. As in
// pgd_step, a thread takes four neighbouring elements of one sample with one 16-byte access a tensor, or one element
// where a sample's length or a pointer does not allow that. Each element is read and written by the same thread.

#include "afd/apgd_step.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

template <class Grad, int kWidth>
__global__ void __launch_bounds__(kThreads) apgd_step_kernel(const ApgdStep args) {
  using Floats = Pack<float, kWidth>;
  using Grads = Pack<typename Grad::type, kWidth>;
  const int64_t per_sample = args.elements / kWidth, packs = args.samples * per_sample;
  for (int64_t p = first_item(); p < packs; p += item_stride()) {
    const Floats x_adv = reinterpret_cast<const Floats*>(args.x_adv)[p];
    const Floats x_adv_old = reinterpret_cast<const Floats*>(args.x_adv_old)[p];
    const Floats x = reinterpret_cast<const Floats*>(args.x)[p];
    const Grads grad = static_cast<const Grads*>(args.grad)[p];
    const int64_t sample = p / per_sample;
    const float step = at(args.step, sample), eps = at(args.eps, sample);
    Floats x_new;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      x_new.v[k] = apgd_step_element(x_adv.v[k], x_adv_old.v[k], x.v[k], Grad::sign(grad.v[k]), step, eps, args.a,
                                     args.rest, args.low, args.high);
    reinterpret_cast<Floats*>(args.x_adv)[p] = x_new;
    reinterpret_cast<Floats*>(args.x_adv_old)[p] = x_adv;
  }
}

template <class Grad>
void launch_for(const ApgdStep& args, cudaStream_t stream) {
  const bool wide = args.elements % 4 == 0 && aligned16(args.x_adv) && aligned16(args.x_adv_old) && aligned16(args.x) &&
                    aligned16(args.grad);
  const int64_t items = args.samples * args.elements / (wide ? 4 : 1);
  if (wide)
    apgd_step_kernel<Grad, 4><<<blocks_for(items), kThreads, 0, stream>>>(args);
  else
    apgd_step_kernel<Grad, 1><<<blocks_for(items), kThreads, 0, stream>>>(args);
}

}  // namespace

int apgd_step(const ApgdStep& args, Launch launch) {
  if (args.samples == 0 || args.elements == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  switch (args.grad_dtype) {
    case DType::f32:
      launch_for<GradF32>(args, stream_of(launch));
      break;
    case DType::f16:
      launch_for<GradF16>(args, stream_of(launch));
      break;
    case DType::bf16:
      launch_for<GradBF16>(args, stream_of(launch));
      break;
  }
  return cudaGetLastError();
}

}  // namespace afd::cuda
