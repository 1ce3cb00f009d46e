// L-infinity PGD step on the CPU. It reads x_adv, x and grad and writes out once each: 16 bytes an element with float32
// gradients, which is its floor (the copy of as many bytes). Each thread walks one contiguous range of the flattened
// batch, sample by sample, so that alpha and eps are constants of the vectorised inner loop.
// Compiled once per instruction set (AFD_ISA); dispatch.cpp picks one.

#include "afd/pgd_step.h"

#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which waking another thread costs more than it saves

template <class Grad>
void step_range(const PgdStep& a, int64_t begin, int64_t end, float alpha, float eps) {
  const float* x_adv = a.x_adv;
  const float* x = a.x;
  const auto* grad = static_cast<const typename Grad::type*>(a.grad);
  float* out = a.out;
  const float low = a.low, high = a.high;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i)
    out[i] = pgd_step_element(x_adv[i], x[i], Grad::sign(grad[i]), alpha, eps, low, high);
}

template <class Grad>
void step_batch(const PgdStep& a, int threads) {
  parallel_for(threads, a.samples * a.elements, kGrain, [&a](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / a.elements;
      const int64_t sample_end = (sample + 1) * a.elements;
      const int64_t stop = sample_end < end ? sample_end : end;
      step_range<Grad>(a, begin, stop, at(a.alpha, sample), at(a.eps, sample));
      begin = stop;
    }
  });
}

}  // namespace

void pgd_step(const PgdStep& args, int threads) {
  PgdStep a = args;
  if (!a.alpha.values && !a.eps.values) {  // no per-sample settings: the batch is one long sample
    a.elements *= a.samples;
    a.samples = 1;
  }
  switch (a.grad_dtype) {
    case DType::f32:
      return step_batch<GradF32>(a, threads);
    case DType::f16:
      return step_batch<GradF16>(a, threads);
    case DType::bf16:
      return step_batch<GradBF16>(a, threads);
  }
}

}  // namespace afd::cpu::AFD_ISA
