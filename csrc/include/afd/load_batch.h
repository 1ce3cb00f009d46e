// A batch of images, straight from the bytes they are stored as: chosen, cropped, mirrored and scaled in one pass.
//
//     out[b, c, h, w] = image[c, h + top, across] / scale,    across = left + (mirrored ? width - 1 - w : w)
//
// and 0 where that lies outside of the image. `image` is number index[b]; its draw settles which of the (2p + 1)^2
// windows of its zero-padded self is served, and whether mirrored. An index that names no image makes its sample NaN.
#pragma once

#include "afd/common.h"

namespace afd {

struct LoadBatch {
  const uint8_t* pixels;  // [images, channels, height, width]
  const int64_t* index;   // [samples]
  const int64_t* draws;   // [images]; null: images as they are
  float* out;             // [samples, channels, height, width]; with channels_last, that is innermost
  int64_t images, samples, channels, height, width;
  float scale;
  int64_t padding;
  bool flip, channels_last;
};

// What one sample shows. (top, left) is where its first pixel comes from, in -padding ... padding.
struct Window {
  const uint8_t* image;  // null: there is no such image
  int64_t top, left;
  bool mirrored;
};

AFD_HOST_DEVICE Window window_of(const LoadBatch& a, int64_t sample) {
  const int64_t number = a.index[sample];
  if (number < 0 || number >= a.images) return {nullptr, 0, 0, false};
  const uint8_t* image = a.pixels + number * a.channels * a.height * a.width;
  if (!a.draws) return {image, 0, 0, false};
  const int64_t span = 2 * a.padding + 1, choices = 2 * span * span;
  int64_t choice = a.draws[number] % choices;
  if (choice < 0) choice += choices;
  const int64_t place = choice / 2;
  return {image, place / span - a.padding, place % span - a.padding, a.flip && choice % 2 == 1};
}

AFD_HOST_DEVICE float scaled_pixel(uint8_t pixel, float scale) {
  return static_cast<float>(static_cast<int32_t>(pixel)) / scale;
}

// Pixel (row, column) of the sample in one channel.
AFD_HOST_DEVICE float load_pixel(const LoadBatch& a, const Window& window, int64_t channel, int64_t row,
                                 int64_t column) {
  if (!window.image) return float_of(0x7fc00000);  // NaN
  const int64_t down = row + window.top, across = window.left + (window.mirrored ? a.width - 1 - column : column);
  if (down < 0 || down >= a.height || across < 0 || across >= a.width) return 0.0f;
  return scaled_pixel(window.image[(channel * a.height + down) * a.width + across], a.scale);
}

namespace cpu {
void load_batch(const LoadBatch& args, Launch launch);
}
namespace cuda {
int load_batch(const LoadBatch& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
