// Projection on the CPU. It reads x_adv and x and writes out: 12 bytes an element, its floor. In Linf each thread walks
// one contiguous range of the flattened batch. In L2 and L1 each takes one sample at a time, in two passes between
// which the sample stays in the thread's cache; L1's search, in between, runs over the packed part of it that matters
// (l1_search.h). Compiled once per instruction set (AFD_ISA); dispatch.cpp picks one.

#include "afd/project.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

void project_linf(const Project& a, int threads) {
  parallel_for(threads, a.samples * a.elements, kRowGrain, [&a](int64_t begin, int64_t end) {
    const float* x_adv = a.x_adv;
    const float* x = a.x;
    float* out = a.out;
    const float low = a.low, high = a.high;
    while (begin < end) {
      const int64_t sample = begin / a.elements, sample_end = (sample + 1) * a.elements;
      const int64_t stop = sample_end < end ? sample_end : end;
      const float eps = at(a.eps, sample);
#pragma omp simd
      for (int64_t i = begin; i < stop; ++i) out[i] = project_linf_element(x_adv[i], x[i], eps, low, high);
      begin = stop;
    }
  });
}

}  // namespace

void project(const Project& a, int threads) {
  if (a.norm == Norm::linf) return project_linf(a, threads);
  const auto row = a.norm == Norm::l2 ? project_l2_row : project_l1_row;
  for_each_row(threads, a.samples, a.elements, [&a, row](int64_t sample) {
    const int64_t first = sample * a.elements;
    row(a.x_adv + first, a.x + first, a.out + first, a.elements, at(a.eps, sample), a.low, a.high);
  });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(project, Project)
