// A query of Square on the CPU, one thread a sample. In Linf it reads and writes two windows, 8 bytes an element each,
// run by run of what is together in memory. In L2 and L1 a proposal changes the whole sample: what changes is left in
// x_tried, the windows of each channel are written into it, and a last pass scales or projects it. Sums go in an order
// that nothing changes (sums.h), those over windows row by row.

#include "afd/square_step.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/rows.h"

namespace afd::cpu::AFD_ISA {
namespace {

// One sample: its memory, and what its draws hang on.
struct Sample {
  float* x_tried;
  float* x_best;
  const float* x;
  uint64_t seed, index;
  float eps;
};

// --- Judgement -------------------------------------------------------------------------------------------------------

struct Judged {
  float loss;
  bool fooled;
};

Judged judge(const SquareStep& a, const float* logits, int64_t y) {
  if (!names_class(a, y)) return {__builtin_nanf(""), false};
  const float own = logits[y];
  float other = -kInfinity;
  bool fooled = false;
  for (int64_t k = 0; k < a.classes; ++k) {
    if (k == y) continue;
    other = larger_or_nan(logits[k], other);
    fooled |= square_beats(logits[k], own, k < y);
  }
  if (!a.cross_entropy) return {other - own, fooled};
  const float largest = larger_or_nan(own, other);
  double sum = 0.0;
  for (int64_t k = 0; k < a.classes; ++k) sum += exp(static_cast<double>(logits[k]) - static_cast<double>(largest));
  return {square_cross_entropy(own, largest, sum), fooled};
}

// --- Linf ------------------------------------------------------------------------------------------------------------

void copy(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// Copies a window, whatever is together at once.
void copy_window(const SquareStep& a, const SquareWindow& window, float* to, const float* from) {
  const SquareStrides strides = square_strides(a);
  const int64_t planes = a.channels_last ? 1 : a.channels, run = window.side * strides.column;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t row = 0; row < window.side; ++row) {
      const int64_t first = plane * strides.channel + (window.top + row) * strides.row + window.left * strides.column;
      copy(to + first, from + first, run);
    }
}

void write_corners(const SquareStep& a, const Sample& s, const SquareWindow& window) {
  const SquareStrides strides = square_strides(a);
  const float low = a.low, high = a.high;
  SquareSigns signs(s.seed, s.index, a.query);
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    const float corner = signs.at(channel) * s.eps;
    for (int64_t row = 0; row < window.side; ++row) {
      const int64_t first = channel * strides.channel + (window.top + row) * strides.row + window.left * strides.column;
      const float* x = s.x + first;
      float* x_tried = s.x_tried + first;
      if (strides.column == 1) {
#pragma omp simd
        for (int64_t i = 0; i < window.side; ++i) x_tried[i] = square_corner(x[i], corner, low, high);
      } else {
        for (int64_t i = 0; i < window.side * strides.column; i += strides.column)
          x_tried[i] = square_corner(x[i], corner, low, high);
      }
    }
  }
}

void write_stripes(const SquareStep& a, const Sample& s) {
  const SquareStrides strides = square_strides(a);
  SquareSigns signs(s.seed, s.index, kFirstPoint);
  for (int64_t channel = 0; channel < a.channels; ++channel)
    for (int64_t column = 0; column < a.width; ++column) {
      const float corner = signs.at(channel * a.width + column) * s.eps;
      const int64_t first = channel * strides.channel + column * strides.column;
      for (int64_t i = first; i < first + a.height * strides.row; i += strides.row)
        s.x_tried[i] = square_corner(s.x[i], corner, a.low, a.high);
    }
}

void step_linf(const SquareStep& a, const Sample& s, const SquareVerdict& verdict) {
  if (verdict.accepted || verdict.rejected) {
    float* to = verdict.accepted ? s.x_best : s.x_tried;
    const float* from = verdict.accepted ? s.x_tried : s.x_best;
    if (a.query == 0)
      copy(to, from, a.elements);
    else
      copy_window(a, square_windows(a, s.seed, s.index, a.query - 1, a.last_side).moved, to, from);
  }
  if (!verdict.proposes) return;
  if (!a.logits)
    write_stripes(a, s);
  else
    write_corners(a, s, square_windows(a, s.seed, s.index, a.query, a.side).moved);
}

// --- L2 and L1 -------------------------------------------------------------------------------------------------------

// body(where in the sample, row of the window, column of the window) over one channel of a window.
template <class Body>
void over_window(const SquareStep& a, const SquareWindow& window, int64_t channel, const Body& body) {
  const SquareStrides strides = square_strides(a);
  for (int64_t row = 0; row < window.side; ++row) {
    const int64_t first = channel * strides.channel + (window.top + row) * strides.row + window.left * strides.column;
    for (int64_t column = 0; column < window.side; ++column) body(first + column * strides.column, row, column);
  }
}

// Leaves in x_tried how the proposal differs from x, before that is scaled or projected.
template <class Length>
void write_change(const SquareStep& a, const Sample& s) {
  const float* x = s.x;
  const float* best = s.x_best;
  float* change = s.x_tried;
#pragma omp simd
  for (int64_t i = 0; i < a.elements; ++i) change[i] = best[i] - x[i];
  const double all = sum_of(a.elements, [=](int64_t i) { return Length::term(change[i]); });
  const SquareWindows windows = square_windows(a, s.seed, s.index, a.query, a.side);
  SquareSigns signs(s.seed, s.index, a.query);
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    const float sign = signs.at(channel);
    double moved = 0.0, emptied = 0.0, grown = 0.0;
    over_window(a, windows.moved, channel, [&](int64_t i, int64_t, int64_t) { moved += Length::term(change[i]); });
    over_window(a, windows.emptied, channel, [&](int64_t i, int64_t row, int64_t column) {
      if (!windows.moved.holds(windows.emptied.top + row, windows.emptied.left + column)) {
        emptied += Length::term(change[i]);
        change[i] = 0.0f;
      }
    });
    const double length = at_least_tiny(Length::length(moved));
    const auto direction = [&](int64_t i, int64_t row, int64_t column) {
      return change[i] / length +
             static_cast<double>(sign * pattern_at(a.pattern, a.side, windows.turned, row, column));
    };
    over_window(a, windows.moved, channel,
                [&](int64_t i, int64_t row, int64_t column) { grown += Length::term(direction(i, row, column)); });
    const double share = Length::share(moved + emptied, all, s.eps, static_cast<double>(a.channels));
    const double factor = share / at_least_tiny(Length::length(grown));
    over_window(a, windows.moved, channel, [&](int64_t i, int64_t row, int64_t column) {
      change[i] = static_cast<float>(direction(i, row, column) * factor);
    });
  }
}

void write_tiles(const SquareStep& a, const Sample& s) {
  const SquareTiles tiles = square_tiles(a);
  SquareSigns signs(s.seed, s.index, kFirstPoint);
  for (int64_t i = 0; i < a.elements; ++i) s.x_tried[i] = square_tile_element(a, tiles, signs, square_place(a, i));
}

// From the change in x_tried to the point.
template <class Length>
void finish(const SquareStep& a, const Sample& s) {
  const float* x = s.x;
  float* point = s.x_tried;
  const float low = a.low, high = a.high;
  if (Length::kNorm == Norm::l1) {
#pragma omp simd
    for (int64_t i = 0; i < a.elements; ++i) point[i] = x[i] + point[i];
    return project_l1_row(point, x, point, a.elements, s.eps, low, high);
  }
  const double squares = sum_of(a.elements, [=](int64_t i) { return Length::term(point[i]); });
  const float factor = square_l2_factor(squares, s.eps);
#pragma omp simd
  for (int64_t i = 0; i < a.elements; ++i) point[i] = square_l2_element(x[i], point[i], factor, low, high);
}

template <class Length>
void step_ball(const SquareStep& a, const Sample& s, const SquareVerdict& verdict) {
  if (verdict.accepted) copy(s.x_best, s.x_tried, a.elements);
  if (verdict.rejected && !verdict.proposes) copy(s.x_tried, s.x_best, a.elements);
  if (!verdict.proposes) return;
  if (!a.logits)
    write_tiles(a, s);
  else
    write_change<Length>(a, s);
  finish<Length>(a, s);
}

}  // namespace

void square_step(const SquareStep& a, int threads) {
  const auto step = a.norm == Norm::linf ? step_linf : a.norm == Norm::l2 ? step_ball<SquareL2> : step_ball<SquareL1>;
  const uint64_t seed = a.seed;
  for_each_row(threads, a.count, a.elements, [&a, step, seed](int64_t row) {
    const int64_t sample = a.rows[row];
    if (sample < 0 || sample >= a.samples) return;
    const Judged judged = a.logits ? judge(a, a.logits + row * a.classes, a.y[sample]) : Judged{0.0f, false};
    const SquareVerdict verdict = square_decide(a, sample, judged.loss, judged.fooled);
    if (a.elements == 0) return;
    const int64_t first = sample * a.elements;
    step(a, {a.x_tried + row * a.elements, a.x_best + first, a.x + first, seed, place_of(a, sample), at(a.eps, sample)},
         verdict);
  });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(square_step, SquareStep)
