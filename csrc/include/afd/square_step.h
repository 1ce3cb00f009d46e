// One query of Square (Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
// search", ECCV 2020; in L1 as Croce & Hein, "Mind the box", ICML 2021, have it): what the model said of the proposals
// that lie in x_tried is judged, and the next proposals are written over them. Per sample, with C channels:
//
//     judge     the proposal becomes the best point where the model is fooled or its loss is higher than the best one
//               (the first point does whatever its loss is); once the model is fooled, the sample is left alone
//     Linf      a square window of the best point moves to the corner clamp(x + s_c * eps, low, high), s_c = +-1
//     L2, L1    with d = x_best - x and two windows of one size, W and the emptied V, in the norm |.| and for each
//               channel c: d[V] becomes 0 and d[W] becomes a_c * u / |u|, where u = d[W] / |d[W]| + s_c * pattern and
//                   L2   a_c^2 = max(eps^2 - |d|^2, 0) / C + |d_c[W or V]|^2
//                   L1   a_c = max(eps - |d|, 0) + C * |d_c[W or V]|
//               L2 scales d to length eps and clamps x + d; L1 projects x + d on ball and box (project.h)
//     begin     Linf: stripes, each column of each channel at a corner; L2, L1: tiles with a pattern each
//
// In Linf nothing but two windows is touched: where the last one lay, its draws say again. Draws come from Philox(seed;
// sample, query): they depend neither on the batch nor on which samples are still asked for.
#pragma once

#include <cmath>

#include "afd/common.h"
#include "afd/philox.h"
#include "afd/project.h"
#include "afd/random_start.h"

namespace afd {

// The first point is query -1. Block 0 of a query says where its windows are; the bits of the others are signs.
constexpr uint32_t kSquareStream = 2;
constexpr int64_t kBitsPerBlock = 128, kFirstPoint = -1;

enum SquareState : uint8_t {
  kSquareBroken = 0,    // the best point fools the model: nothing happens
  kSquareStanding = 1,  // x_tried is to be judged
  kSquareResumed = 2    // x_tried is the best point itself, not to be judged: it turned out not to fool the model
};

struct SquareStep {
  float* x_tried;        // [rows, elements]
  float* x_best;         // [samples, elements]
  const float* x;        // same
  const float* logits;   // [rows, classes], of x_tried; null to begin
  const int64_t* y;      // [samples]
  float* loss_best;      // [samples]
  uint8_t* state;        // [samples], of SquareState
  const int64_t* rows;   // [rows]: which sample each is, all different; one that is none is left alone
  const float* pattern;  // [side, side]; not read in Linf
  int64_t count, samples, elements, classes;  // count: of rows
  int64_t channels, height, width;
  bool channels_last, cross_entropy;  // the loss is the margin otherwise
  int64_t query, side, last_side;     // of the proposal to write, if side > 0; last_side: of the one before it
  PerSample eps;
  float low, high;
  Norm norm;
  Key seed;
  uint64_t first_sample;
  const int64_t* places;  // [samples]: index of each in the whole data set; null: first_sample and what follows it
};

AFD_HOST_DEVICE uint64_t place_of(const SquareStep& a, int64_t sample) {
  return a.places ? static_cast<uint64_t>(a.places[sample]) : a.first_sample + static_cast<uint64_t>(sample);
}

// --- Judgement -------------------------------------------------------------------------------------------------------

// Whether a class is predicted rather than the sample's own, which is behind it if `before`: the first of the largest
// is predicted, and NaN counts as the largest.
AFD_HOST_DEVICE bool square_beats(float logit, float own, bool before) {
  if (own != own) return before & (logit != logit);
  return (logit > own) | (before & (logit == own)) | (logit != logit);
}

// The larger one, NaN if either is.
AFD_HOST_DEVICE float larger_or_nan(float a, float b) { return (a > b) | (a != a) ? a : b; }

AFD_HOST_DEVICE bool names_class(const SquareStep& a, int64_t y) { return (y >= 0) & (y < a.classes); }

// -log softmax(logits)[y], given the largest logit and the sum of exp(logit - largest).
AFD_HOST_DEVICE float square_cross_entropy(float own, float largest, double sum) {
  return static_cast<float>(log(sum) - (static_cast<double>(own) - static_cast<double>(largest)));
}

struct SquareVerdict {
  bool accepted, rejected, proposes;  // where neither of the first two, x_tried is the best point already
};

AFD_HOST_DEVICE SquareVerdict square_decide(const SquareStep& a, int64_t sample, float loss, bool fooled) {
  const uint8_t state = a.state[sample];
  const bool judged = a.logits && state == kSquareStanding;
  const bool accepted = judged && (a.query == 0 || fooled || loss > a.loss_best[sample]);
  const bool broken = state == kSquareBroken || (judged && fooled);
  if (accepted) a.loss_best[sample] = loss;
  a.state[sample] = broken ? kSquareBroken : kSquareStanding;
  return {accepted, judged && !accepted, !broken && a.side > 0};
}

// --- Draws -----------------------------------------------------------------------------------------------------------

AFD_HOST_DEVICE Philox square_draw(uint64_t seed, uint64_t sample, int64_t query, int64_t block) {
  return philox_at(seed, sample, static_cast<uint32_t>(query), kSquareStream + static_cast<uint32_t>(block));
}

// The random signs of a query, 128 from one draw, which is kept: neighbours are asked for together.
class SquareSigns {
 public:
  AFD_HOST_DEVICE_MEMBER SquareSigns(uint64_t seed, uint64_t sample, int64_t query)
      : seed_(seed), sample_(sample), query_(query) {}

  AFD_HOST_DEVICE_MEMBER float at(int64_t number) { return bit(number) ? 1.0f : -1.0f; }

  AFD_HOST_DEVICE_MEMBER bool bit(int64_t number) {
    if (number / kBitsPerBlock != block_) {
      block_ = number / kBitsPerBlock;
      drawn_ = square_draw(seed_, sample_, query_, 1 + block_);
    }
    const int word = static_cast<int>(number / 32 % 4);
    const uint32_t bits = word < 2 ? word ? drawn_.v1 : drawn_.v0 : word == 2 ? drawn_.v2 : drawn_.v3;
    return bits >> number % 32 & 1;
  }

 private:
  uint64_t seed_, sample_;
  int64_t query_, block_ = -1;
  Philox drawn_ = {0, 0, 0, 0};
};

struct SquareWindow {
  int64_t top, left, side;
  AFD_HOST_DEVICE_MEMBER bool holds(int64_t row, int64_t column) const {
    return (row >= top) & (row < top + side) & (column >= left) & (column < left + side);
  }
};

struct SquareWindows {
  SquareWindow moved, emptied;
  bool turned;  // whether the pattern is transposed
};

// Of `room` places, each as likely; the lowest bit is left for another use.
AFD_HOST_DEVICE int64_t place_of(uint32_t bits, int64_t room) {
  return static_cast<int64_t>(static_cast<uint64_t>(bits >> 1) * static_cast<uint64_t>(room) >> 31);
}

AFD_HOST_DEVICE SquareWindows square_windows(const SquareStep& a, uint64_t seed, uint64_t sample, int64_t query,
                                             int64_t side) {
  const Philox drawn = square_draw(seed, sample, query, 0);
  const int64_t down = a.height - side + 1, across = a.width - side + 1;
  return {{place_of(drawn.v0, down), place_of(drawn.v1, across), side},
          {place_of(drawn.v2, down), place_of(drawn.v3, across), side},
          (drawn.v0 & 1) != 0};
}

// --- Places ----------------------------------------------------------------------------------------------------------

// How far neighbours in a sample's memory are.
struct SquareStrides {
  int64_t channel, row, column;
};

AFD_HOST_DEVICE SquareStrides square_strides(const SquareStep& a) {
  if (a.channels_last) return {1, a.width * a.channels, a.channels};
  return {a.height * a.width, a.width, 1};
}

struct SquarePlace {
  int64_t channel, row, column;
};

// Of the element that lies at i.
AFD_HOST_DEVICE SquarePlace square_place(const SquareStep& a, int64_t i) {
  if (a.channels_last) return {i % a.channels, i / a.channels / a.width, i / a.channels % a.width};
  return {i / (a.height * a.width), i / a.width % a.height, i % a.width};
}

AFD_HOST_DEVICE float pattern_at(const float* pattern, int64_t side, bool turned, int64_t row, int64_t column) {
  return turned ? pattern[column * side + row] : pattern[row * side + column];
}

// The tiles of the first point: as many as fit, in the middle.
struct SquareTiles {
  int64_t down, across, top, left;
};

AFD_HOST_DEVICE SquareTiles square_tiles(const SquareStep& a) {
  const int64_t down = a.height / a.side, across = a.width / a.side;
  return {down, across, (a.height - down * a.side) / 2, (a.width - across * a.side) / 2};
}

// What the first point changes at a place in L2 and L1, before it is scaled or projected.
AFD_HOST_DEVICE float square_tile_element(const SquareStep& a, const SquareTiles& tiles, SquareSigns& signs,
                                          SquarePlace place) {
  const int64_t row = place.row - tiles.top, column = place.column - tiles.left;
  if ((row < 0) | (column < 0)) return 0.0f;
  const int64_t tile_row = row / a.side, tile_column = column / a.side;
  if ((tile_row >= tiles.down) | (tile_column >= tiles.across)) return 0.0f;
  const int64_t first = (tile_row * tiles.across + tile_column) * (a.channels + 1);
  const bool turned = signs.bit(first + a.channels);
  const int64_t in_row = row - tile_row * a.side, in_column = column - tile_column * a.side;
  return signs.at(first + place.channel) * pattern_at(a.pattern, a.side, turned, in_row, in_column);
}

AFD_HOST_DEVICE float square_corner(float x, float signed_eps, float low, float high) {
  return clamped(x + signed_eps, low, high);
}

// --- Lengths in L2 and L1 --------------------------------------------------------------------------------------------

constexpr double kSquareTiny = 1e-12;  // the least length that is divided by

struct SquareL2 {
  static constexpr Norm kNorm = Norm::l2;
  AFD_HOST_DEVICE double term(double d) { return d * d; }
  AFD_HOST_DEVICE double length(double sum) { return sqrt(sum); }
  // What a channel's window is given: `held` is the sum over its two windows, `all` that of the sample.
  AFD_HOST_DEVICE double share(double held, double all, double eps, double channels) {
    const double left = eps * eps - all;
    return sqrt((left > 0.0 ? left : 0.0) / channels + held);
  }
};
struct SquareL1 {
  static constexpr Norm kNorm = Norm::l1;
  AFD_HOST_DEVICE double term(double d) { return fabs(d); }
  AFD_HOST_DEVICE double length(double sum) { return sum; }
  AFD_HOST_DEVICE double share(double held, double all, double eps, double channels) {
    const double left = eps - all;
    return (left > 0.0 ? left : 0.0) + channels * held;
  }
};

AFD_HOST_DEVICE double at_least_tiny(double length) { return length < kSquareTiny ? kSquareTiny : length; }

// The factor that brings a change to length eps, a few roundings short of it (as l2_factor).
AFD_HOST_DEVICE float square_l2_factor(double squares, float eps) {
  return static_cast<float>(static_cast<double>(eps) / at_least_tiny(sqrt(squares)) * (1.0 - 1.0 / (1 << 22)));
}

AFD_HOST_DEVICE float square_l2_element(float x, float change, float factor, float low, float high) {
  return clamped(plus_towards(x, change * factor), low, high);
}

namespace cpu {
void square_step(const SquareStep& args, Launch launch);
}
namespace cuda {
int square_step(const SquareStep& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
