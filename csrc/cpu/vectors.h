// Rows times a vector and their weighted sum: the two halves of a power iteration, on kLanes columns at a time.
//
// Lanes is a vector of the compiler's own, which each instruction set cuts to its width: the order of every sum, and so
// its bits, is the same on all of them.
#pragma once

#include <cstring>
#include <type_traits>

#include "afd/common.h"

namespace afd::cpu::AFD_ISA {

constexpr int kWide = 16;            // floats in Lanes
constexpr int kColumns = 2 * kWide;  // columns of a dot product that are summed apart

using Lanes = float __attribute__((vector_size(kWide * sizeof(float))));

AFD_HOST_DEVICE void load(Lanes& lanes, const float* from) { memcpy(&lanes, from, sizeof lanes); }
AFD_HOST_DEVICE void store(float* to, const Lanes& lanes) { memcpy(to, &lanes, sizeof lanes); }

// dots[r] = row r of w, times v, for kRows rows.
template <int kRows>
inline void dot_rows(const float* w, const float* v, int64_t columns, float* dots) {
  Lanes low[kRows] = {}, high[kRows] = {};
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    Lanes v_low, v_high;
    load(v_low, v + j);
    load(v_high, v + j + kWide);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Lanes w_low, w_high;
      load(w_low, w + r * columns + j);
      load(w_high, w + r * columns + j + kWide);
      low[r] += w_low * v_low;
      high[r] += w_high * v_high;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t k = j; k < columns; ++k) {
      const int lane = static_cast<int>(k - j);
      const float term = w[r * columns + k] * v[k];
      if (lane < kWide)
        low[r][lane] += term;
      else
        high[r][lane - kWide] += term;
    }
    low[r] += high[r];
    double sum = 0.0;
    for (int lane = 0; lane < kWide; ++lane) sum += static_cast<double>(low[r][lane]);
    dots[r] = static_cast<float>(sum);
  }
}

// sum += the kRows rows of w, each times its factor.
template <int kRows>
inline void add_rows(const float* w, const float* factors, int64_t columns, float* sum) {
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    Lanes total;
    load(total, sum + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Lanes row;
      load(row, w + r * columns + j);
      total += row * factors[r];
    }
    store(sum + j, total);
  }
  for (; j < columns; ++j)
    for (int r = 0; r < kRows; ++r) sum[j] += w[r * columns + j] * factors[r];
}

// body(constant kRows, first row) over `rows` rows, four at a time.
template <class Body>
inline void by_fours(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>(), r);
  for (; r < rows; ++r) body(std::integral_constant<int, 1>(), r);
}

}  // namespace afd::cpu::AFD_ISA
