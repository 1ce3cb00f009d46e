// What the CPU kernels do with one sample at a time: sums, and the projections that project and pgd_step share. Every
// loop below is vectorised; sums run over kLanes columns that are added up at the end, so their order (and so their
// value) depends on neither threads, batch, alignment nor vector width.
#pragma once

#include "afd/l1_threshold.h"
#include "afd/project.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {

constexpr int kLanes = 32;
constexpr int64_t kRowGrain = 16384;  // elements below which waking another thread costs more than it saves

// Calls body(sample) for each sample, one thread a sample.
template <class Body>
inline void for_each_row(int threads, int64_t samples, int64_t elements, const Body& body) {
  const int64_t grain = (kRowGrain + elements - 1) / (elements > 0 ? elements : 1);
  parallel_for(threads, samples, grain > 0 ? grain : 1, [&body](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) body(sample);
  });
}

// sum(term(i)) over [0, count), in double.
template <class Term>
inline double sum_of(int64_t count, const Term& term) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += term(i);
  double sum = 0.0;
  for (double lane : sums) sum += lane;
  return sum;
}

// sum(term(i) ** 2) over [0, count): the squares and the sums of four of them in float, the rest in double.
template <class Term>
inline double quick_squares(int64_t count, const Term& term) {
  constexpr int kColumns = 16;
  const auto square = [=](int64_t i) __attribute__((always_inline)) {
    const float value = term(i);
    return value * value;
  };
  double sums[kColumns] = {};
  int64_t i = 0;
  for (; i + 4 * kColumns <= count; i += 4 * kColumns) {
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) {
      const int64_t k = i + column;
      const float a = square(k), b = square(k + kColumns), c = square(k + 2 * kColumns), d = square(k + 3 * kColumns);
      sums[column] += static_cast<double>((a + b) + (c + d));
    }
  }
  for (int column = 0; i < count; ++i, column = (column + 1) % kColumns) sums[column] += square(i);
  double sum = 0.0;
  for (double column : sums) sum += column;
  return sum;
}

// Whether such a sum lost nothing that matters: no square was too large for a float, and those too small are nothing
// beside it.
inline bool trusted(double squares) { return squares > 1e-24 && squares < 1e30; }

// --- L2 --------------------------------------------------------------------------------------------------------------

inline void clamp_row(const float* x_adv, float* out, int64_t count, float low, float high) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = clamped(x_adv[i], low, high);
}

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

// The first pass of the search: lambda = 0. A NaN passes through l1_room's side of min_of into the sum.
inline L1Threshold survey_l1_row(const float* x_adv, const float* x, int64_t count, float eps, float low, float high) {
  double sums[kLanes] = {};
  float largest[kLanes] = {};
  int sloping[kLanes] = {};
  const auto look = [&](int64_t i, int lane) __attribute__((always_inline)) {
    const float u = x_adv[i] - x[i], size = fabsf(u), room = l1_room(u, x[i], low, high);
    sums[lane] += static_cast<double>(min_of(room, size));
    largest[lane] = max_of(size, largest[lane]);
    sloping[lane] += l1_term(size, room).sloping;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) look(i + lane, lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) look(i, lane);
  double sum = 0.0;
  float most = 0.0f;
  int64_t slopes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
    most = max_of(largest[lane], most);
    slopes += sloping[lane];
  }
  return L1Threshold(eps, sum, slopes, most);
}

// f and its slope at the search's next lambda. A block is four vectors of columns, added in float as a tree, so that
// only their sums are widened to double.
inline void add_l1_pass(L1Threshold& search, const float* x_adv, const float* x, int64_t count, float low, float high) {
  constexpr int kColumns = 16;
  const L1Cut cut = l1_cut(search.lambda());
  double sums[kColumns] = {};
  int sloping[kColumns] = {};
  const auto term = [=](int64_t i)
                        __attribute__((always_inline)) { return l1_term_at(x_adv[i], x[i], cut, low, high); };
  int64_t i = 0;
  for (; i + 4 * kColumns <= count; i += 4 * kColumns) {
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) {
      const int64_t k = i + column;
      const L1Term a = term(k), b = term(k + kColumns), c = term(k + 2 * kColumns), d = term(k + 3 * kColumns);
      sums[column] += static_cast<double>((a.kept + b.kept) + (c.kept + d.kept));
      sloping[column] += (a.sloping + b.sloping) + (c.sloping + d.sloping);
    }
  }
  for (int column = 0; i < count; ++i, column = (column + 1) % kColumns) {
    const L1Term last = term(i);
    sums[column] += static_cast<double>(last.kept);
    sloping[column] += last.sloping;
  }
  double sum = 0.0;
  int64_t slopes = 0;
  for (int column = 0; column < kColumns; ++column) {
    sum += sums[column];
    slopes += sloping[column];
  }
  search.add(sum, slopes);
}

// `out` may be x_adv.
inline void project_l1_row(const float* x_adv, const float* x, float* out, int64_t count, float eps, float low,
                           float high) {
  L1Threshold search = survey_l1_row(x_adv, x, count, eps, low, high);
  while (search.searching()) add_l1_pass(search, x_adv, x, count, low, high);
  const double lambda = search.lambda();
  if (lambda == 0.0) return clamp_row(x_adv, out, count, low, high);
  const L1Cut cut = l1_cut(lambda);
  const float bad = lambda == lambda ? 0.0f : static_cast<float>(lambda);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = project_l1_element(x_adv[i], x[i], cut, low, high) + bad;
}

}  // namespace afd::cpu::AFD_ISA
