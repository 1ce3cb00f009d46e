// PGD step on the GPU: 16 bytes an element (float32 gradients), bound by memory bandwidth. In Linf a thread takes four
// neighbouring elements of one sample with one 16-byte access a tensor; where a sample's length or a pointer does not
// allow that, one element. The division that finds the sample is hidden behind the loads.
//
// In L2 and L1 one block takes a sample: it measures the gradient (its norm, or its k-th largest size in about eight
// passes through the cache), writes the stepped sample to shared memory and projects it there. A sample that does not
// fit is stepped and projected in out by one large block in L1, and by two launches of many blocks in L2.

#include "afd/pgd_step.h"

#include "afd/kth_largest.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

template <class Grad, int kWidth>
__global__ void __launch_bounds__(kThreads) linf_kernel(const PgdStep a) {
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
void launch_linf(const PgdStep& a, cudaStream_t stream) {
  const bool wide =
      a.elements % 4 == 0 && aligned16(a.x_adv) && aligned16(a.x) && aligned16(a.grad) && aligned16(a.out);
  const int64_t items = a.samples * a.elements / (wide ? 4 : 1);
  if (wide)
    linf_kernel<Grad, 4><<<blocks_for(items), kThreads, 0, stream>>>(a);
  else
    linf_kernel<Grad, 1><<<blocks_for(items), kThreads, 0, stream>>>(a);
}

// --- One block a sample ----------------------------------------------------------------------------------------------

template <class Grad>
__device__ void l2_step_row(const PgdStep& a, int64_t sample, float* stepped) {
  const float* x_adv = a.x_adv + sample * a.elements;
  const auto* grad = static_cast<const typename Grad::type*>(a.grad) + sample * a.elements;
  const double squares = sum_of(a.elements, [=](int64_t i) {
    const double g = Grad::value(grad[i]);
    return g * g;
  });
  const double stride = l2_stride(squares, at(a.alpha, sample));
  for_own(a.elements, [=](int64_t i) { stepped[i] = l2_stepped(x_adv[i], Grad::value(grad[i]), stride); });
}

template <class Grad>
__device__ void l1_step_row(const PgdStep& a, int64_t sample, float* stepped) {
  const float* x_adv = a.x_adv + sample * a.elements;
  const auto* grad = static_cast<const typename Grad::type*>(a.grad) + sample * a.elements;
  const auto count_reaching = [=](int32_t threshold) {
    int64_t reaching = 0;
    for_own(a.elements, [&](int64_t i) { reaching += Grad::key(grad[i]) >= threshold; });
    return block_sum(reaching);
  };
  int32_t largest = 0;
  for_own(a.elements, [&](int64_t i) { largest = max(largest, Grad::key(grad[i])); });
  KthLargest search(count_to_move(a.sparsity, sample, a.elements), count_reaching(1), block_max(largest));
  while (search.searching()) search.add(count_reaching(search.threshold()));
  const int32_t threshold = search.threshold();
  const float stride = at(a.alpha, sample) / static_cast<float>(search.reaching());
  for_own(a.elements, [=](int64_t i) {
    stepped[i] = l1_stepped(x_adv[i], Grad::sign(grad[i]), Grad::key(grad[i]) >= threshold, stride);
  });
}

template <class Grad, Norm kNorm>
__global__ void __launch_bounds__(1024) row_kernel(const PgdStep a, bool on_chip) {
  extern __shared__ float chip[];
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const float* x = a.x + sample * a.elements;
    float* out = a.out + sample * a.elements;
    float* stepped = on_chip ? chip : out;
    if (kNorm == Norm::l2)
      l2_step_row<Grad>(a, sample, stepped);
    else
      l1_step_row<Grad>(a, sample, stepped);
    if (on_chip) {
      for_own(a.elements, [&](int64_t i) { chip[a.elements + i] = x[i]; });
      x = chip + a.elements;
    }
    project_row<kNorm>(stepped, x, out, a.elements, at(a.eps, sample), a.low, a.high);
  }
}

template <class Grad, Norm kNorm>
void launch_rows(const PgdStep& a, cudaStream_t stream) {
  row_kernel<Grad, kNorm>
      <<<row_blocks(a.samples), row_threads(a.elements), row_memory(a.elements), stream>>>(a, fits_on_chip(a.elements));
}

// --- L2 in two launches ----------------------------------------------------------------------------------------------

template <class Grad>
__global__ void __launch_bounds__(kThreads) l2_measure_kernel(const PgdStep a, int chunks) {
  const Share share = share_of(a.elements, chunks);
  const auto* grad = static_cast<const typename Grad::type*>(a.grad);
  Moments own = {0.0, 0.0, 0.0};
  for_own(share.count, [&](int64_t i) {
    const int64_t k = share.first + i;
    const double u = a.x_adv[k] - a.x[k], g = Grad::value(grad[k]);
    own.uu += u * u;
    own.ug += u * g;
    own.gg += g * g;
  });
  keep_moments(own, a.workspace);
}

template <class Grad>
__global__ void __launch_bounds__(kThreads) l2_write_kernel(const PgdStep a, int chunks) {
  const Share share = share_of(a.elements, chunks);
  const Moments sum = kept_moments(share.sample, chunks, a.workspace);
  const double stride = l2_stride(sum.gg, at(a.alpha, share.sample));
  const double squares = sum.uu + stride * (2.0 * sum.ug + stride * sum.gg);
  const float factor = l2_factor(squares < 0.0 ? 0.0 : squares, at(a.eps, share.sample));
  const auto* grad = static_cast<const typename Grad::type*>(a.grad);
  for_own(share.count, [=](int64_t i) {
    const int64_t k = share.first + i;
    const float stepped = l2_stepped(a.x_adv[k], Grad::value(grad[k]), stride);
    a.out[k] =
        factor == 1.0f ? clamped(stepped, a.low, a.high) : project_l2_element(stepped, a.x[k], factor, a.low, a.high);
  });
}

template <class Grad>
void launch_l2_in_chunks(const PgdStep& a, cudaStream_t stream) {
  const int chunks = chunks_of(a.elements);
  const auto blocks = static_cast<unsigned>(a.samples * chunks);
  l2_measure_kernel<Grad><<<blocks, kThreads, 0, stream>>>(a, chunks);
  l2_write_kernel<Grad><<<blocks, kThreads, 0, stream>>>(a, chunks);
}

template <class Grad>
void launch_for(const PgdStep& a, cudaStream_t stream) {
  if (a.norm == Norm::linf)
    launch_linf<Grad>(a, stream);
  else if (a.norm == Norm::l1)
    launch_rows<Grad, Norm::l1>(a, stream);
  else if (fits_on_chip(a.elements))
    launch_rows<Grad, Norm::l2>(a, stream);
  else
    launch_l2_in_chunks<Grad>(a, stream);
}

}  // namespace

int pgd_step(const PgdStep& args, Launch launch) {
  PgdStep a = args;
  if (a.norm == Norm::linf && !a.alpha.values &&
      !a.eps.values) {  // no per-sample settings: the batch is one long sample
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
