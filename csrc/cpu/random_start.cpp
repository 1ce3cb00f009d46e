// Random start on the CPU: 8 bytes an element, but ten Philox rounds a block of four make it bound by arithmetic. Tiles
// of 16 blocks keep the rounds in vector registers; threads share the tiles of the whole batch evenly. Compiled once
// per instruction set (AFD_ISA); dispatch.cpp picks one.

#include "afd/random_start.h"

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

}  // namespace

void random_start(const RandomStart& a, int threads) {
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

}  // namespace afd::cpu::AFD_ISA
