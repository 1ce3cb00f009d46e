// PGD step on the CPU. It reads x_adv, x and grad and writes out once each: 16 bytes an element with float32 gradients,
// which is its floor (the copy of as many bytes). In Linf each thread walks one contiguous range of the flattened
// batch, sample by sample, so that alpha and eps are constants of the vectorised inner loop. In L2 and L1 each thread
// takes one sample at a time, which stays in its cache: the gradient is measured (its norm, or its k-th largest size),
// the stepped sample is written to out, and out is projected where it lies. L2 works in float, and in double where a
// sample's gradient is too small, too large or not finite. Compiled once per instruction set (AFD_ISA); dispatch.cpp
// picks one.

#include "afd/pgd_step.h"

#include "afd/kth_largest.h"
#include "cpu/dispatch.h"
#include "cpu/rows.h"
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

// --- L2 --------------------------------------------------------------------------------------------------------------

// Steps along grad(i) and projects. `Real` is the type the product needs.
template <class Real, class Value>
void l2_move(const PgdStep& a, int64_t sample, const Value& grad, Real stride) {
  const int64_t first = sample * a.elements;
  const float* x_adv = a.x_adv + first;
  const float* x = a.x + first;
  float* out = a.out + first;
  const double quick = quick_squares(a.elements, [=](int64_t i) {
    out[i] = l2_stepped(x_adv[i], grad(i), stride);
    return out[i] - x[i];
  });
  shrink_l2_row(out, x, out, a.elements, at(a.eps, sample), a.low, a.high, quick);
}

template <class Grad>
void l2_row(const PgdStep& a, int64_t sample) {
  const auto* grad = static_cast<const typename Grad::type*>(a.grad) + sample * a.elements;
  const auto raw = [=](int64_t i) { return Grad::raw(grad[i]); };
  const auto finite = [=](int64_t i) { return Grad::value(grad[i]); };
  const double quick = quick_squares(a.elements, raw), stride = l2_stride(quick, at(a.alpha, sample));
  if (trusted(quick) && fabs(stride) < kLargestFloat) return l2_move(a, sample, raw, static_cast<float>(stride));
  const double squares = sum_of(a.elements, [=](int64_t i) {
    const double g = finite(i);
    return g * g;
  });
  l2_move(a, sample, finite, l2_stride(squares, at(a.alpha, sample)));
}

// --- L1 --------------------------------------------------------------------------------------------------------------

constexpr int64_t kCountChunk = 1 << 16;  // so that counts fit the 32-bit lanes that comparisons have

template <class Grad>
int64_t count_reaching(const typename Grad::type* grad, int64_t elements, int32_t threshold) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < elements; begin += kCountChunk) {
    const int64_t left = elements - begin;
    const int count = static_cast<int>(left < kCountChunk ? left : kCountChunk);
    const auto* chunk = grad + begin;
    int reaching = 0;
#pragma omp simd reduction(+ : reaching)
    for (int i = 0; i < count; ++i) reaching += Grad::key(chunk[i]) >= threshold;
    total += reaching;
  }
  return total;
}

template <class Grad>
int32_t largest_key(const typename Grad::type* grad, int64_t elements) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < elements; ++i) largest = largest > Grad::key(grad[i]) ? largest : Grad::key(grad[i]);
  return largest;
}

template <class Grad>
void l1_row(const PgdStep& a, int64_t sample) {
  const int64_t first = sample * a.elements;
  const float* x_adv = a.x_adv + first;
  const auto* grad = static_cast<const typename Grad::type*>(a.grad) + first;
  float* out = a.out + first;
  KthLargest search(count_to_move(a.sparsity, sample, a.elements), count_reaching<Grad>(grad, a.elements, 1),
                    largest_key<Grad>(grad, a.elements));
  while (search.searching()) search.add(count_reaching<Grad>(grad, a.elements, search.threshold()));
  const int32_t threshold = search.threshold();
  const float stride = at(a.alpha, sample) / static_cast<float>(search.reaching());
#pragma omp simd
  for (int64_t i = 0; i < a.elements; ++i)
    out[i] = l1_stepped(x_adv[i], Grad::sign(grad[i]), Grad::key(grad[i]) >= threshold, stride);
  project_l1_row(out, a.x + first, out, a.elements, at(a.eps, sample), a.low, a.high);
}

template <class Grad>
void step_in_norm(const PgdStep& a, int threads) {
  if (a.norm == Norm::linf) return step_batch<Grad>(a, threads);
  const auto row = a.norm == Norm::l2 ? l2_row<Grad> : l1_row<Grad>;
  for_each_row(threads, a.samples, a.elements, [&a, row](int64_t sample) { row(a, sample); });
}

}  // namespace

void pgd_step(const PgdStep& args, int threads) {
  PgdStep a = args;
  if (a.norm == Norm::linf && !a.alpha.values &&
      !a.eps.values) {  // no per-sample settings: the batch is one long sample
    a.elements *= a.samples;
    a.samples = 1;
  }
  switch (a.grad_dtype) {
    case DType::f32:
      return step_in_norm<GradF32>(a, threads);
    case DType::f16:
      return step_in_norm<GradF16>(a, threads);
    case DType::bf16:
      return step_in_norm<GradBF16>(a, threads);
  }
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(pgd_step, PgdStep)
