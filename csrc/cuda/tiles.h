// How kernels that go over rows of floats share them out: a row is cut into packs of four neighbours at the 16-byte
// boundaries of memory, packs lie along a grid's x and rows along its y. Neighbouring threads take neighbouring packs
// of a row, then the next row, so that short rows fill a block too. In x a grid covers all packs (CUDA's limit there is
// beyond any memory); in y and z, where it is 65535 blocks, threads stride over what a grid leaves. Counts are 64-bit:
// no shape overflows them.
//
// Host-and-device code without a CUDA header, so that a machine without a GPU walks whole grids through it.
#pragma once

#include <cstdint>

#include "afd/common.h"

namespace afd::cuda {

constexpr int kThreads = 256;

// --- Packs -----------------------------------------------------------------------------------------------------------

// kWidth neighbours, moved by one access where they are together at most 16 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};
using Quad = Pack<float, 4>;

AFD_HOST_DEVICE bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Pack p of a row holds the elements first ... first + 3; those in its lanes [begin, end) are the row's, and none are
// behind the row's last pack.
struct Cut {
  int64_t first;
  int begin, end;
};

AFD_HOST_DEVICE Cut cut_of(const float* row, int64_t count, int64_t pack) {
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(row) / 4 % 4);  // floats behind a boundary
  const int64_t first = 4 * pack - skew, left = count - first;
  return {first, first < 0 ? skew : 0, left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4};
}

// What a thread writes: lanes [begin, end) of `quad`, to their places in the four floats at `place`.
struct Run {
  float* place;
  Quad quad;
  int begin, end;
};

// Both by one access where it is all four, on a boundary.
AFD_HOST_DEVICE void put(const Run& run) {
  if (run.begin == 0 && run.end == 4 && aligned16(run.place)) {
    *reinterpret_cast<Quad*>(run.place) = run.quad;
    return;
  }
  for (int k = 0; k < 4; ++k)
    if (k >= run.begin && k < run.end) run.place[k] = run.quad.v[k];
}

AFD_HOST_DEVICE Quad get(const float* place, int count) {
  if (count == 4 && aligned16(place)) return *reinterpret_cast<const Quad*>(place);
  Quad quad = {};
  for (int k = 0; k < 4; ++k)
    if (k < count) quad.v[k] = place[k];
  return quad;
}

// --- Grids -----------------------------------------------------------------------------------------------------------

struct Grid {
  unsigned x, y, z;               // blocks
  unsigned threads_x, threads_y;  // of a block, at most kThreads together
};

constexpr int64_t kMostBlocks = 65535;  // in y and z

AFD_HOST_DEVICE int64_t ceil_div(int64_t count, int64_t each) { return (count + each - 1) / each; }
AFD_HOST_DEVICE unsigned blocks_for_rows(int64_t count) {
  return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
}

// For layers of rows of packs, each at least 1. A thread takes `rows_each` rows, or more where the grid ends.
AFD_HOST_DEVICE Grid grid_of(int64_t packs, int64_t rows, int64_t layers = 1, int64_t rows_each = 1) {
  const int64_t pieces = ceil_div(packs, kThreads), across = ceil_div(packs, pieces), fitting = kThreads / across;
  const int64_t down = rows < fitting ? rows : fitting;
  return {static_cast<unsigned>(pieces), blocks_for_rows(ceil_div(rows, down * rows_each)), blocks_for_rows(layers),
          static_cast<unsigned>(across), static_cast<unsigned>(down)};
}

}  // namespace afd::cuda
