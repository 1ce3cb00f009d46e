// What the CPU kernels do with one sample at a time: the projections that project and pgd_step share. Results depend on
// neither threads, batch, alignment nor vector width, because the sums behind them do not (sums.h, l1_search.h).
#pragma once

#include "afd/l1_threshold.h"
#include "afd/project.h"
#include "cpu/l1_search.h"
#include "cpu/sums.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {

constexpr int64_t kRowGrain = 16384;  // elements below which waking another thread costs more than it saves

// Calls body(sample) for each sample, one thread a sample.
template <class Body>
inline void for_each_row(int threads, int64_t samples, int64_t elements, const Body& body) {
  const int64_t grain = (kRowGrain + elements - 1) / (elements > 0 ? elements : 1);
  parallel_for(threads, samples, grain > 0 ? grain : 1, [&body](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) body(sample);
  });
}

inline void clamp_row(const float* x_adv, float* out, int64_t count, float low, float high) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = clamped(x_adv[i], low, high);
}

inline void fill_row(float* out, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// --- L2 --------------------------------------------------------------------------------------------------------------

// What is left to do once quick_squares of x_adv - x is known. `out` may be x_adv.
inline void shrink_l2_row(const float* x_adv, const float* x, float* out, int64_t count, float eps, float low,
                          float high, double quick) {
  const auto square = [=](int64_t i) {
    const double u = x_adv[i] - x[i];
    return u * u;
  };
  const float factor = l2_factor(trusted(quick) ? quick : sum_of(count, square), eps);
  if (factor == 1.0f) return clamp_row(x_adv, out, count, low, high);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = project_l2_element(x_adv[i], x[i], factor, low, high);
}

inline void project_l2_row(const float* x_adv, const float* x, float* out, int64_t count, float eps, float low,
                           float high) {
  const double quick = quick_squares(count, [=](int64_t i) { return x_adv[i] - x[i]; });
  shrink_l2_row(x_adv, x, out, count, eps, low, high, quick);
}

// --- L1 --------------------------------------------------------------------------------------------------------------

// `out` may be x_adv.
inline void project_l1_row(const float* x_adv, const float* x, float* out, int64_t count, float eps, float low,
                           float high) {
  const double lambda = l1_lambda({x_adv, x, count, low, high}, eps);
  if (lambda == 0.0) return clamp_row(x_adv, out, count, low, high);
  if (lambda != lambda) return fill_row(out, count, static_cast<float>(lambda));
  const L1Cut cut = l1_cut(lambda);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = project_l1_element(x_adv[i], x[i], cut, low, high);
}

}  // namespace afd::cpu::AFD_ISA
