// What the blocks and threads of load_batch do; the kernel adds the launch. Host-and-device code (tiles.h).
//
// A layer is what the threads of a block share a window of: one plane, or with channels_last one image, whose rows are
// width * channels floats. Rows, columns and addresses are found once a pack, in 64 bits; what is left to do an element
// needs its lane alone.
#pragma once

#include "afd/load_batch.h"
#include "cuda/tiles.h"

namespace afd::cuda {

constexpr int64_t kRowsEach = 4;  // of a thread: what a block shares costs two reads in a row, and divisions

// What a block shares: the window, and what each of a byte's values becomes.
struct Layer {
  int64_t first_pixel;  // where in a.pixels the layer begins; negative: there is no such image
  int64_t top, left;    // as of a Window
  bool mirrored;
};
struct Scaled {
  float of[256];
};

struct Bytes {
  uint8_t v[4];
};

// The same batch in longer rows, where it has them: an image as it is lies in one line.
AFD_HOST_DEVICE LoadBatch in_long_rows(const LoadBatch& batch) {
  LoadBatch a = batch;
  if (a.channels == 1) a.channels_last = false;
  if (a.draws || a.channels_last) return a;
  a.width *= a.channels * a.height;
  a.channels = a.height = 1;
  return a;
}

AFD_HOST_DEVICE int64_t layers_of(const LoadBatch& a) { return a.channels_last ? a.samples : a.samples * a.channels; }
AFD_HOST_DEVICE int64_t row_length(const LoadBatch& a) { return a.channels_last ? a.width * a.channels : a.width; }

AFD_HOST_DEVICE Layer layer_of(const LoadBatch& a, int64_t layer) {
  const int64_t sample = a.channels_last ? layer : layer / a.channels;
  const int64_t channel = a.channels_last ? 0 : layer - sample * a.channels;
  const Window window = window_of(a, sample);
  const int64_t first_pixel = window.image ? window.image - a.pixels + channel * a.height * a.width : -1;
  return {first_pixel, window.top, window.left, window.mirrored};
}

AFD_HOST_DEVICE Grid load_batch_grid(const LoadBatch& a) {
  const int64_t length = row_length(a);
  const bool even = length % 4 == 0 && aligned16(a.out);  // else a row may begin up to three floats off a boundary
  return grid_of(even ? length / 4 : (length + 6) / 4, a.height, layers_of(a), kRowsEach);
}

// Four neighbours of a plane's row. Those outside of the image are 0, and so is all that the row does not have.
AFD_HOST_DEVICE Bytes neighbours(const LoadBatch& a, const Layer& layer, int64_t row, const Cut& cut) {
  const int64_t down = row + layer.top;
  const int64_t leftmost = layer.left + (layer.mirrored ? a.width - 4 - cut.first : cut.first);
  const int64_t right = a.width - leftmost;
  const bool shown = down >= 0 && down < a.height && leftmost > -4 && right > 0;
  const int begin = leftmost < 0 ? static_cast<int>(-leftmost) : 0, end = right < 4 ? static_cast<int>(right) : 4;
  const uint8_t* source = a.pixels + layer.first_pixel + down * a.width + leftmost;
  Bytes upright, bytes;
  for (int k = 0; k < 4; ++k) upright.v[k] = shown && k >= begin && k < end ? source[k] : 0;
  for (int k = 0; k < 4; ++k) bytes.v[k] = layer.mirrored ? upright.v[3 - k] : upright.v[k];
  return bytes;
}

// Four neighbours of an image's row with channels_last; what the row does not have is 0.
AFD_HOST_DEVICE Bytes interleaved(const LoadBatch& a, const Layer& layer, int64_t row, const Cut& cut) {
  const int64_t down = row + layer.top, plane = a.height * a.width;
  const int64_t start = cut.first + cut.begin, column = start / a.channels;  // nvcc divides in 32 bits where that does
  int64_t channel = start - column * a.channels;
  int64_t across = layer.left + (layer.mirrored ? a.width - 1 - column : column);
  const uint8_t* source = a.pixels + layer.first_pixel + channel * plane + down * a.width;
  const bool shown = down >= 0 && down < a.height;
  Bytes bytes = {};
  for (int k = 0; k < 4; ++k) {
    if (k < cut.begin || k >= cut.end) continue;
    if (shown && across >= 0 && across < a.width) bytes.v[k] = source[across];
    source += plane;
    if (++channel == a.channels) {
      channel = 0;
      source -= a.channels * plane;
      across += layer.mirrored ? -1 : 1;
    }
  }
  return bytes;
}

// Pack number `pack` of one row, which goes to `out`.
template <bool kChannelsLast>
AFD_HOST_DEVICE Run load_pack(const LoadBatch& a, const Layer& layer, const Scaled& scaled, int64_t row, float* out,
                              int64_t pack) {
  constexpr float kNaN = __builtin_nanf("");
  const Cut cut = cut_of(out, row_length(a), pack);
  Quad quad = {{kNaN, kNaN, kNaN, kNaN}};
  if (layer.first_pixel >= 0) {
    const Bytes bytes = kChannelsLast ? interleaved(a, layer, row, cut) : neighbours(a, layer, row, cut);
    for (int k = 0; k < 4; ++k) quad.v[k] = scaled.of[bytes.v[k]];
  }
  return {out + cut.first, quad, cut.begin, cut.end};
}

}  // namespace afd::cuda
