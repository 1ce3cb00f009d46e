// Random start on the CPU: 8 bytes an element, but ten Philox rounds a block of four make it bound by arithmetic. Tiles
// of 16 blocks keep the rounds in vector registers. In Linf threads share the tiles of the whole batch evenly. In L2
// and L1 they share the samples: one pass leaves a sample's draws in out and sums them up by their place in the tile
// (so in an order that nothing changes), a second scales them. Compiled once per instruction set (AFD_ISA);
// dispatch.cpp picks one.

#include "afd/random_start.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int kBlocks = 16, kTile = 4 * kBlocks;  // elements a tile
constexpr int64_t kGrain = 64;                    // tiles

void fill_uniform(uint64_t seed, uint64_t sample, uint32_t first_block, float* uniform) {
#pragma omp simd
  for (int b = 0; b < kBlocks; ++b) {
    const Philox drawn = philox_at(seed, sample, first_block + static_cast<uint32_t>(b), kRandomStartStream);
    uniform[4 * b] = symmetric_uniform(drawn.v0);
    uniform[4 * b + 1] = symmetric_uniform(drawn.v1);
    uniform[4 * b + 2] = symmetric_uniform(drawn.v2);
    uniform[4 * b + 3] = symmetric_uniform(drawn.v3);
  }
}

void fill_words(uint64_t seed, uint64_t sample, uint32_t first_block, uint32_t* words) {
#pragma omp simd
  for (int b = 0; b < kBlocks; ++b) {
    const Philox drawn = philox_at(seed, sample, first_block + static_cast<uint32_t>(b), kRandomStartStream);
    words[4 * b] = drawn.v0;
    words[4 * b + 1] = drawn.v1;
    words[4 * b + 2] = drawn.v2;
    words[4 * b + 3] = drawn.v3;
  }
}

template <class Ball>
void start_row(const RandomStart& a, int64_t row) {
  const uint64_t sample = a.first_sample + static_cast<uint64_t>(row);
  const float* x = a.x + row * a.elements;
  float* out = a.out + row * a.elements;
  uint32_t words[kTile];
  float draws[kTile];
  double sums[kTile] = {};
  for (int64_t first = 0; first < a.elements; first += kTile) {
    fill_words(a.seed, sample, static_cast<uint32_t>(first / 4), words);
#pragma omp simd
    for (int pair = 0; pair < kTile / 2; ++pair) {
      const TwoFloats drawn = Ball::draw(words[2 * pair], words[2 * pair + 1]);
      draws[2 * pair] = drawn.first;
      draws[2 * pair + 1] = drawn.second;
    }
    const int64_t left = a.elements - first;
    const int count = static_cast<int>(left < kTile ? left : kTile);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      sums[i] += Ball::term(draws[i]);
      out[first + i] = draws[i];
    }
  }
  double sum = Ball::extra(philox_at(a.seed, sample, 0, kRandomStartExtraStream));
  for (double column : sums) sum += column;
  const float scale = Ball::scale(at(a.eps, row), sum);
#pragma omp simd
  for (int64_t i = 0; i < a.elements; ++i) out[i] = random_start_element(x[i], out[i], scale, a.low, a.high);
}

void start_linf(const RandomStart& a, int threads) {
  const int64_t tiles = (a.elements + kTile - 1) / kTile;
  parallel_for(threads, a.samples * tiles, kGrain, [&a, tiles](int64_t begin, int64_t end) {
    float uniform[kTile];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t sample = t / tiles, first = (t % tiles) * kTile;
      fill_uniform(a.seed, a.first_sample + static_cast<uint64_t>(sample), static_cast<uint32_t>(first / 4), uniform);
      const int64_t left = a.elements - first;
      const int count = static_cast<int>(left < kTile ? left : kTile);
      const float eps = at(a.eps, sample);
      const float* x = a.x + sample * a.elements + first;
      float* out = a.out + sample * a.elements + first;
#pragma omp simd
      for (int i = 0; i < count; ++i) out[i] = random_start_element(x[i], uniform[i], eps, a.low, a.high);
    }
  });
}

}  // namespace

void random_start(const RandomStart& a, int threads) {
  if (a.norm == Norm::linf) return start_linf(a, threads);
  const auto row = a.norm == Norm::l2 ? start_row<BallL2> : start_row<BallL1>;
  for_each_row(threads, a.samples, a.elements, [&a, row](int64_t sample) { row(a, sample); });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(random_start, RandomStart)
