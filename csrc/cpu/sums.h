// Sums over one sample on the CPU. Every loop is vectorised over a fixed number of columns that are added up at the
// end, so their order (and so their value) depends on neither threads, batch, alignment nor vector width.
#pragma once

#include <cstdint>

namespace afd::cpu::AFD_ISA {

constexpr int kLanes = 32;

// The sum of Count columns, a power of two, added as a tree: one after the other, each addition waits for the last.
template <int Count>
inline double tree_sum(double (&columns)[Count]) {
  for (int half = Count / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int column = 0; column < half; ++column) columns[column] += columns[column + half];
  }
  return columns[0];
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
  return tree_sum(sums);
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
  return tree_sum(sums);
}

// Whether such a sum lost nothing that matters: no square was too large for a float, and those too small are nothing
// beside it.
inline bool trusted(double squares) { return squares > 1e-24 && squares < 1e30; }

}  // namespace afd::cpu::AFD_ISA
