// Walks whole CUDA grids on the host. Every block and thread goes through the functions that the kernels call; each
// element of `out` must be written exactly once, with what the formula says, and nothing beside it.
// Compiled and run by test_cuda_grids.py.

#include <sys/mman.h>

#include <cstdio>
#include <vector>

#include "cuda/load_batch.h"
#include "cuda/random_start.h"

using namespace afd;
using namespace afd::cuda;

namespace {

int failures = 0;

void fail(const char* what, int64_t at, double got, double want) {
  if (++failures <= 20) std::printf("%s, element %lld: %g, not %g\n", what, static_cast<long long>(at), got, want);
}

uint32_t noise(uint64_t number) { return philox4x32(number, 0, 0, 0, 0).v0; }

// `count` floats, the first `skew` floats behind a 16-byte boundary, with a margin in front and behind.
class Out {
 public:
  Out(int64_t count, int skew)
      : count_(count),
        times_(count),
        memory_(count / 4 + 5, Quad{{kBlank, kBlank, kBlank, kBlank}}),
        first_(memory_[1].v + skew) {}
  float* data() { return first_; }
  void take(const Run& run) {
    for (int k = run.begin; k < run.end; ++k) {
      const int64_t i = run.place + k - first_;
      if (i < 0 || i >= count_) return fail("written outside of out", i, 1, 0);
      ++times_[i];
    }
    put(run);
  }
  template <class Wanted>
  void compare(const char* what, const Wanted& wanted) {
    for (int64_t i = 0; i < count_; ++i) {
      if (times_[i] != 1) fail("times written", i, times_[i], 1);
      if (bits_of(first_[i]) != bits_of(wanted(i))) fail(what, i, first_[i], wanted(i));
    }
    for (int64_t i = 1; i <= 4; ++i)
      if (first_[-i] != kBlank || first_[count_ + i - 1] != kBlank) fail("margin", i, first_[-i], kBlank);
  }

 private:
  static constexpr float kBlank = -7.0f;
  int64_t count_;
  std::vector<int> times_;
  std::vector<Quad> memory_;
  float* first_;
};

// --- Grids -----------------------------------------------------------------------------------------------------------

// Whether threads meet every pack of every row once, with strides over what the grid leaves.
void cover(int64_t packs, int64_t rows, int64_t rows_each) {
  const Grid grid = grid_of(packs, rows, 1, rows_each);
  const unsigned threads = grid.threads_x * grid.threads_y;
  if (threads == 0 || threads > kThreads) fail("threads of a block", packs, threads, kThreads);
  std::vector<int> met(packs * rows);
  const int64_t across = int64_t{grid.x} * grid.threads_x, down = int64_t{grid.y} * grid.threads_y;
  for (int64_t y = 0; y < down; ++y)
    for (int64_t row = y; row < rows; row += down)
      for (int64_t pack = 0; pack < across && pack < packs; ++pack) ++met[row * packs + pack];
  for (size_t i = 0; i < met.size(); ++i)
    if (met[i] != 1) fail("times met", static_cast<int64_t>(i), met[i], 1);
}

void covers() {
  for (int64_t packs : {1, 7, 8, 9, 56, 128, 129, 255, 256, 257, 511, 513, 1025})
    for (int64_t rows : {1, 2, 3, 31, 257, 1000})
      for (int64_t rows_each : {1, 4}) cover(packs, rows, rows_each);
  cover(1, 20000000, 1);  // more rows than 65535 blocks hold
}

// --- load_batch ------------------------------------------------------------------------------------------------------

// The formula of afd/load_batch.h for element i of out.
float wanted_pixel(const LoadBatch& a, int64_t i) {
  const int64_t plane = a.height * a.width, sample = i / (a.channels * plane), j = i % (a.channels * plane);
  const int64_t channel = a.channels_last ? j % a.channels : j / plane;
  const int64_t pixel = a.channels_last ? j / a.channels : j % plane;
  return load_pixel(a, window_of(a, sample), channel, pixel / a.width, pixel % a.width);
}

template <bool kChannelsLast>
void walk(const LoadBatch& a, const Grid& grid, Out& out) {
  Scaled scaled;
  for (int value = 0; value < 256; ++value) scaled.of[value] = scaled_pixel(static_cast<uint8_t>(value), a.scale);
  const int64_t across = int64_t{grid.x} * grid.threads_x, down = int64_t{grid.y} * grid.threads_y;
  for (int64_t z = 0; z < grid.z; ++z)
    for (int64_t l = z; l < layers_of(a); l += grid.z) {
      const Layer layer = layer_of(a, l);
      float* first = a.out + l * a.height * row_length(a);
      for (int64_t y = 0; y < down; ++y)
        for (int64_t row = y; row < a.height; row += down)
          for (int64_t pack = 0; pack < across; ++pack)
            out.take(load_pack<kChannelsLast>(a, layer, scaled, row, first + row * row_length(a), pack));
    }
}

struct Shape {
  int64_t samples, channels, height, width, padding;
};

// With a grid of one block in y and z, threads stride over all rows and layers.
void load(const Shape& shape, bool drawn, bool channels_last, int skew, bool one_block) {
  const int64_t images = 3, elements = shape.channels * shape.height * shape.width;
  std::vector<uint8_t> pixels(images * elements);
  std::vector<int64_t> index(shape.samples), draws(images);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<uint8_t>(noise(i));
  for (size_t i = 0; i < index.size(); ++i)
    index[i] = static_cast<int64_t>(noise(i) % 4) - (i == 2 ? 4 : 0);  // some name no image
  for (int64_t i = 0; i < images; ++i) draws[i] = static_cast<int64_t>(noise(i + shape.width)) - (int64_t{1} << 31);
  Out out(shape.samples * elements, skew);
  const LoadBatch batch = {pixels.data(),  index.data(),  drawn ? draws.data() : nullptr,
                           out.data(),     images,        shape.samples,
                           shape.channels, shape.height,  shape.width,
                           255.0f,         shape.padding, true,
                           channels_last};
  const LoadBatch a = in_long_rows(batch);
  Grid grid = load_batch_grid(a);
  if (one_block) grid.y = grid.z = 1;
  a.channels_last ? walk<true>(a, grid, out) : walk<false>(a, grid, out);
  out.compare("load_batch", [&](int64_t i) { return wanted_pixel(batch, i); });
}

void load_batches() {
  const Shape shapes[] = {{3, 3, 32, 32, 4},  {3, 1, 28, 28, 2}, {4, 3, 33, 31, 5}, {4, 3, 7, 33, 40},
                          {5, 2, 9, 1, 1},    {5, 4, 1, 1, 0},   {3, 5, 3, 6, 2},   {2, 1, 2, 2049, 3},
                          {2, 3, 1100, 2, 1}, {2, 260, 2, 5, 1}};
  for (const Shape& shape : shapes)
    for (int choice = 0; choice < 32; ++choice) load(shape, choice & 1, choice & 2, choice / 4 % 4, choice & 16);
}

// --- random_start ----------------------------------------------------------------------------------------------------

void start(int64_t samples, int64_t elements, int x_skew, int skew, bool one_block) {
  Out out(samples * elements, skew);
  std::vector<Quad> memory(samples * elements / 4 + 2);
  std::vector<float> epsilons(samples);
  float* x = memory[0].v + x_skew;
  for (int64_t i = 0; i < samples * elements; ++i) x[i] = open_uniform(noise(i));
  for (int64_t i = 0; i < samples; ++i) epsilons[i] = 0.1f * static_cast<float>(i + 1);
  const uint64_t seed = 0x123456789abcdef;
  const RandomStart a = {x,    out.data(), samples,    elements,        {epsilons.data(), 0.0f},
                         0.0f, 1.0f,       Norm::linf, {nullptr, seed}, uint64_t{1} << 40};
  Grid grid = random_start_grid(a);
  if (one_block) grid.y = 1;
  const int64_t across = int64_t{grid.x} * grid.threads_x, down = int64_t{grid.y} * grid.threads_y;
  for (int64_t y = 0; y < down; ++y)
    for (int64_t sample = y; sample < samples; sample += down)
      for (int64_t block = 0; block < across; ++block) out.take(start_block(a, seed, sample, at(a.eps, sample), block));
  out.compare("random_start", [&](int64_t i) {
    const int64_t sample = i / elements, j = i % elements;
    const Philox drawn = philox_at(seed, a.first_sample + static_cast<uint64_t>(sample), static_cast<uint32_t>(j / 4),
                                   kRandomStartStream);
    const uint32_t words[] = {drawn.v0, drawn.v1, drawn.v2, drawn.v3};
    const float moved = x[i] + epsilons[sample] * symmetric_uniform(words[j % 4]);
    return moved < 0.0f ? 0.0f : moved > 1.0f ? 1.0f : moved;
  });
}

void random_starts() {
  for (int64_t elements : {1, 3, 4, 33, 784, 1027, 3072, 12289})
    for (int64_t samples : {1, 3, 300})
      for (int choice = 0; choice < 8 && samples * elements < 400000; ++choice)
        start(samples, elements, choice & 1 ? 3 : 0, choice & 2 ? 1 : 0, choice & 4);
}

// --- Where 32 bits would overflow ------------------------------------------------------------------------------------

// Address space without memory: pages come into being where they are touched, and read as 0.
template <class T>
T* reserve(int64_t count) {
  void* place =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) fail("bytes of address space", static_cast<int64_t>(count * sizeof(T)), 0, 1);
  return static_cast<T*>(place);
}

// One image of more than 2^32 pixels: a few packs around every place where a narrower number would wrap.
template <bool kChannelsLast>
void load_giant(int64_t channels, int64_t height, int64_t width) {
  const int64_t elements = channels * height * width, index = 0;
  auto* pixels = reserve<uint8_t>(elements);
  auto* out = reserve<float>(elements);
  const LoadBatch a = {pixels, &index, nullptr, out, 1, 1, channels, height, width, 255.0f, 0, false, kChannelsLast};
  const Grid grid = load_batch_grid(a);
  Scaled scaled;
  for (int value = 0; value < 256; ++value) scaled.of[value] = static_cast<float>(value);
  for (int64_t power : {29, 30, 31, 32})
    for (int64_t i = (int64_t{1} << power) - 6; i < (int64_t{1} << power) + 6; ++i) {
      const int64_t length = row_length(a), l = i / length / a.height, row = i / length % a.height, column = i % length;
      const int64_t pack = column / 4, pixel = i / channels, plane = height * width;
      pixels[kChannelsLast ? i % channels * plane + pixel : i] = static_cast<uint8_t>(power + i % 64);
      if (pack >= int64_t{grid.x} * grid.threads_x) fail("packs a grid covers", i, grid.x * grid.threads_x, pack);
      put(load_pack<kChannelsLast>(a, layer_of(a, l), scaled, row, out + i - column, pack));
      if (out[i] != static_cast<float>(power + i % 64))
        fail("giant image", i, out[i], static_cast<double>(power + i % 64));
    }
  munmap(pixels, elements);
  munmap(out, 4 * elements);
}

void giants() {
  const int64_t row = (int64_t{1} << 32) + 64;
  load_giant<false>(1, 1, row);
  load_giant<false>(1, row / 4, 4);
  load_giant<false>(row / 64, 8, 8);
  load_giant<true>(4, 1, row / 4);
  load_giant<true>(2, row / 8, 4);
  const Grid wide = grid_of(int64_t{1} << 38, 1), many = grid_of(1, int64_t{1} << 40, int64_t{1} << 40);
  if (wide.x != 1u << 30 || wide.threads_x != kThreads) fail("blocks of a long row", 0, wide.x, 1 << 30);
  if (many.y != 65535 || many.z != 65535) fail("blocks in y and z", 0, many.y, 65535);
}

}  // namespace

int main() {
  covers();
  load_batches();
  random_starts();
  giants();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
