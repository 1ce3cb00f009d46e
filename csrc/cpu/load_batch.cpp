// Loading a batch on the CPU: it reads a byte and writes a float an element, which is its floor. Threads share the rows
// of all images. Rows are short and windows begin anywhere, so the bytes are first put in a line, in the order of the
// output, and a full line is then scaled at once: the vectors are full, whatever the width. A whole image that is
// served as it is, is such a line already. Compiled once per instruction set (AFD_ISA); dispatch.cpp picks one.

#include "afd/load_batch.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which waking another thread costs more than it saves
constexpr int64_t kLine = 4096;    // bytes

void scale_line(const uint8_t* bytes, float* out, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = scaled_pixel(bytes[i], scale);
}

// Bytes on their way to `out`.
class Line {
 public:
  Line(float* out, float scale) : out_(out), scale_(scale) {}
  ~Line() { flush(); }
  uint8_t* take(int64_t count) {  // at most kLine
    if (used_ + count > kLine) flush();
    used_ += count;
    return bytes_ + used_ - count;
  }

 private:
  void flush() {
    scale_line(bytes_, out_, used_, scale_);
    out_ += used_;
    used_ = 0;
  }
  uint8_t bytes_[kLine];
  int64_t used_ = 0;
  float* out_;
  float scale_;
};

// Columns [first, first + count) of one row of the window, every `step` bytes.
void put_row(const LoadBatch& a, const Window& window, int64_t channel, int64_t row, int64_t first, int64_t count,
             uint8_t* to, int64_t step) {
  const int64_t down = row + window.top;
  // column c shows pixel c + shift, or shift - c if mirrored: one inside the image for c in [begin, end)
  const int64_t shift = window.left + (window.mirrored ? a.width - 1 : 0);
  int64_t begin = window.mirrored ? window.left : -window.left, end = begin + a.width;
  begin = begin > first ? begin - first : 0;
  end = end < first + count ? end - first : count;
  if (down < 0 || down >= a.height || begin >= end) begin = end = count;
  const uint8_t* source = window.image + (channel * a.height + down) * a.width;
  for (int64_t c = 0; c < begin; ++c) to[c * step] = 0;
  if (window.mirrored)
    for (int64_t c = begin; c < end; ++c) to[c * step] = source[shift - first - c];
  else if (step == 1)
    memcpy(to + begin, source + first + begin + shift, static_cast<size_t>(end - begin));
  else
    for (int64_t c = begin; c < end; ++c) to[c * step] = source[first + c + shift];
  for (int64_t c = end; c < count; ++c) to[c * step] = 0;
}

void load_planes(const LoadBatch& a, const Window& window, int64_t begin, int64_t end, float* out) {
  const int64_t plane = a.height * a.width;
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    const int64_t start = channel * plane + begin * a.width;
    if (!a.draws) {
      scale_line(window.image + start, out + start, (end - begin) * a.width, a.scale);
      continue;
    }
    Line line(out + start, a.scale);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t first = 0; first < a.width; first += kLine) {
        const int64_t left = a.width - first, count = left < kLine ? left : kLine;
        put_row(a, window, channel, row, first, count, line.take(count), 1);
      }
  }
}

void load_interleaved(const LoadBatch& a, const Window& window, int64_t begin, int64_t end, float* out) {
  const int64_t most = kLine / a.channels;  // columns a line holds
  Line line(out + begin * a.width * a.channels, a.scale);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t first = 0; first < a.width; first += most) {
      const int64_t left = a.width - first, count = left < most ? left : most;
      uint8_t* to = line.take(count * a.channels);
      for (int64_t channel = 0; channel < a.channels; ++channel)
        put_row(a, window, channel, row, first, count, to + channel, a.channels);
    }
}

// Rows of any sample, element by element: where there is no image, or a pixel has more channels than a line holds.
void load_slowly(const LoadBatch& a, const Window& window, int64_t begin, int64_t end, float* out) {
  for (int64_t channel = 0; channel < a.channels; ++channel)
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < a.width; ++column)
        out[a.channels_last ? (row * a.width + column) * a.channels + channel
                            : (channel * a.height + row) * a.width + column] =
            load_pixel(a, window, channel, row, column);
}

}  // namespace

void load_batch(const LoadBatch& a, int threads) {
  const int64_t in_a_row = a.channels * a.width;
  if (a.samples == 0 || a.height == 0 || in_a_row == 0) return;
  const int64_t grain = (kGrain + in_a_row - 1) / in_a_row;
  parallel_for(threads, a.samples * a.height, grain, [&a](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / a.height, first = begin % a.height, left = a.height - first;
      const int64_t rows = left < end - begin ? left : end - begin;
      const Window window = window_of(a, sample);
      const bool interleaved = a.channels_last && a.channels > 1;
      const auto load = !window.image || (interleaved && a.channels > kLine) ? load_slowly
                        : interleaved                                        ? load_interleaved
                                                                             : load_planes;
      load(a, window, first, first + rows, a.out + sample * a.channels * a.height * a.width);
      begin += rows;
    }
  });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(load_batch, LoadBatch)
