// A query of Square on the GPU, one block a sample. All threads read the logits; the first one decides, and the others
// read its verdict. In Linf they share the elements of two windows, 8 bytes each; a barrier keeps what is restored
// apart from what is written, for the windows overlap. In L2 and L1 the change is left in x_tried, a warp takes a
// channel's windows, whose sums need no barrier then, and the whole block scales or projects the sample (rows.cuh).
// Sums add in an order that the sample's size alone decides.

#include "afd/square_step.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

struct Sample {
  float* x_tried;
  float* x_best;
  const float* x;
  uint64_t seed, index;
  float eps;
};

// --- Judgement -------------------------------------------------------------------------------------------------------

__device__ SquareVerdict verdict_of(const SquareStep& a, int64_t row, int64_t sample) {
  __shared__ SquareVerdict verdict;
  float loss = __int_as_float(0x7fffffff);  // NaN
  bool fooled = false;
  const int64_t y = a.logits ? a.y[sample] : -1;
  if (a.logits && names_class(a, y)) {
    const float* logits = a.logits + row * a.classes;
    const float own = logits[y];
    float other = -kInfinity;
    bool beaten = false;
    for_own(a.classes, [&](int64_t k) {
      if (k == y) return;
      other = larger_or_nan(logits[k], other);
      beaten |= square_beats(logits[k], own, k < y);
    });
    other = block_join(other, [](float one, float two) { return larger_or_nan(one, two); });
    fooled = __syncthreads_or(beaten) != 0;
    loss = other - own;
    if (a.cross_entropy) {
      const float largest = larger_or_nan(own, other);
      const double sum = sum_of(
          a.classes, [=](int64_t k) { return exp(static_cast<double>(logits[k]) - static_cast<double>(largest)); });
      loss = square_cross_entropy(own, largest, sum);
    }
  }
  __syncthreads();  // the last sample's readers are done
  if (threadIdx.x == 0) verdict = square_decide(a, sample, loss, fooled);
  __syncthreads();
  return verdict;
}

__device__ void copy(float* to, const float* from, int64_t count) {
  for_own(count, [=](int64_t i) { to[i] = from[i]; });
}

// --- Linf ------------------------------------------------------------------------------------------------------------

// body(where in the sample, channel) for this thread's part of a window, neighbours in memory by neighbouring threads.
template <class Body>
__device__ void over_own(const SquareStep& a, const SquareWindow& window, const Body& body) {
  const SquareStrides strides = square_strides(a);
  const int64_t plane = window.side * window.side;
  for_own(a.channels * plane, [&](int64_t k) {
    const int64_t channel = a.channels_last ? k % a.channels : k / plane;
    const int64_t place = a.channels_last ? k / a.channels : k % plane;
    const int64_t row = window.top + place / window.side, column = window.left + place % window.side;
    body(channel * strides.channel + row * strides.row + column * strides.column, channel);
  });
}

struct StepLinf {
  static __device__ void run(const SquareStep& a, const Sample& s, const SquareVerdict& verdict) {
    if (verdict.accepted || verdict.rejected) {
      float* to = verdict.accepted ? s.x_best : s.x_tried;
      const float* from = verdict.accepted ? s.x_tried : s.x_best;
      if (a.query == 0)
        copy(to, from, a.elements);
      else
        over_own(a, square_windows(a, s.seed, s.index, a.query - 1, a.last_side).moved,
                 [=](int64_t i, int64_t) { to[i] = from[i]; });
    }
    if (!verdict.proposes) return;
    __syncthreads();
    if (!a.logits) {
      SquareSigns signs(s.seed, s.index, kFirstPoint);
      for_own(a.elements, [&](int64_t i) {
        const SquarePlace place = square_place(a, i);
        const float corner = signs.at(place.channel * a.width + place.column) * s.eps;
        s.x_tried[i] = square_corner(s.x[i], corner, a.low, a.high);
      });
      return;
    }
    SquareSigns signs(s.seed, s.index, a.query);
    over_own(a, square_windows(a, s.seed, s.index, a.query, a.side).moved, [&](int64_t i, int64_t channel) {
      s.x_tried[i] = square_corner(s.x[i], signs.at(channel) * s.eps, a.low, a.high);
    });
  }
};

// --- L2 and L1 -------------------------------------------------------------------------------------------------------

// The same in every lane.
__device__ double every_lane_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// body(where in the sample, row of the window, column of the window) for this lane's part of a channel's window.
template <class Body>
__device__ void over_lane(const SquareStep& a, const SquareWindow& window, int64_t channel, const Body& body) {
  const SquareStrides strides = square_strides(a);
  for (int64_t k = threadIdx.x % 32; k < window.side * window.side; k += 32) {
    const int64_t row = k / window.side, column = k % window.side;
    body(channel * strides.channel + (window.top + row) * strides.row + (window.left + column) * strides.column, row,
         column);
  }
}

template <class Length>
__device__ void write_change(const SquareStep& a, const Sample& s) {
  const float* x = s.x;
  const float* best = s.x_best;
  float* change = s.x_tried;
  const double all = sum_of(a.elements, [=](int64_t i) {
    const float d = best[i] - x[i];
    change[i] = d;
    return Length::term(d);
  });  // with barriers behind the writes
  const SquareWindows windows = square_windows(a, s.seed, s.index, a.query, a.side);
  SquareSigns signs(s.seed, s.index, a.query);
  for (int64_t channel = threadIdx.x / 32; channel < a.channels; channel += blockDim.x / 32) {
    const float sign = signs.at(channel);
    double moved = 0.0, emptied = 0.0, grown = 0.0;
    over_lane(a, windows.moved, channel, [&](int64_t i, int64_t, int64_t) { moved += Length::term(change[i]); });
    over_lane(a, windows.emptied, channel, [&](int64_t i, int64_t row, int64_t column) {
      if (!windows.moved.holds(windows.emptied.top + row, windows.emptied.left + column)) {
        emptied += Length::term(change[i]);
        change[i] = 0.0f;
      }
    });
    moved = every_lane_sum(moved);
    emptied = every_lane_sum(emptied);
    const double length = at_least_tiny(Length::length(moved));
    const auto direction = [&](int64_t i, int64_t row, int64_t column) {
      const float drawn = sign * pattern_at(a.pattern, a.side, windows.turned, row, column);
      return change[i] / length + static_cast<double>(drawn);
    };
    over_lane(a, windows.moved, channel,
              [&](int64_t i, int64_t row, int64_t column) { grown += Length::term(direction(i, row, column)); });
    grown = every_lane_sum(grown);
    const double share = Length::share(moved + emptied, all, s.eps, static_cast<double>(a.channels));
    const double factor = share / at_least_tiny(Length::length(grown));
    over_lane(a, windows.moved, channel, [&](int64_t i, int64_t row, int64_t column) {
      change[i] = static_cast<float>(direction(i, row, column) * factor);
    });
  }
}

template <class Length>
struct StepBall {
  static __device__ void run(const SquareStep& a, const Sample& s, const SquareVerdict& verdict) {
    if (verdict.accepted) copy(s.x_best, s.x_tried, a.elements);
    if (verdict.rejected && !verdict.proposes) copy(s.x_tried, s.x_best, a.elements);
    if (!verdict.proposes) return;
    if (a.logits) {
      write_change<Length>(a, s);
    } else {
      const SquareTiles tiles = square_tiles(a);
      SquareSigns signs(s.seed, s.index, kFirstPoint);
      for_own(a.elements, [&](int64_t i) { s.x_tried[i] = square_tile_element(a, tiles, signs, square_place(a, i)); });
    }
    __syncthreads();
    finish(a, s);
  }

  // From the change in x_tried to the point.
  static __device__ void finish(const SquareStep& a, const Sample& s) {
    const float* x = s.x;
    float* point = s.x_tried;
    const float low = a.low, high = a.high;
    if (Length::kNorm == Norm::l1) {
      for_own(a.elements, [=](int64_t i) { point[i] = x[i] + point[i]; });
      return project_l1_row(point, x, point, a.elements, s.eps, low, high);
    }
    const double squares = sum_of(a.elements, [=](int64_t i) { return Length::term(point[i]); });
    const float factor = square_l2_factor(squares, s.eps);
    for_own(a.elements, [=](int64_t i) { point[i] = square_l2_element(x[i], point[i], factor, low, high); });
  }
};

constexpr int kMostThreads = 512;  // with more, registers would not suffice

template <class Step>
__global__ void __launch_bounds__(kMostThreads) square_kernel(const SquareStep a) {
  const uint64_t seed = a.seed;
  for (int64_t row = blockIdx.x; row < a.count; row += gridDim.x) {
    const int64_t sample = a.rows[row];
    if (sample < 0 || sample >= a.samples) continue;
    const SquareVerdict verdict = verdict_of(a, row, sample);
    const int64_t first = sample * a.elements;
    Step::run(
        a, {a.x_tried + row * a.elements, a.x_best + first, a.x + first, seed, place_of(a, sample), at(a.eps, sample)},
        verdict);
  }
}

template <class Step>
void launch_step(const SquareStep& a, cudaStream_t stream) {
  const int wanted = row_threads(a.elements), threads = wanted < kMostThreads ? wanted : kMostThreads;
  square_kernel<Step><<<row_blocks(a.count), threads, 0, stream>>>(a);
}

}  // namespace

int square_step(const SquareStep& a, Launch launch) {
  if (a.count == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  if (a.norm == Norm::l2)
    launch_step<StepBall<SquareL2>>(a, stream_of(launch));
  else if (a.norm == Norm::l1)
    launch_step<StepBall<SquareL1>>(a, stream_of(launch));
  else
    launch_step<StepLinf>(a, stream_of(launch));
  return cudaGetLastError();
}

}  // namespace afd::cuda
