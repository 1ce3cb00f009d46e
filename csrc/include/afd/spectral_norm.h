// The power iteration of a group of matrices (Miyato et al. 2018), for each W [rows, columns] with its u and v:
//
//     n_iter times:  u = W v / |W v|,  v = Wt u / |Wt u|      (in the other order where v is first)
//     sigma = ut W v
//
// A vector whose successor is no longer than eps stays as it is; a sigma of at most eps in size becomes eps.
//
// With u first, W v and its way back need W once: when a row has met v, it is multiplied by that product and added up
// while it is still at hand, and both lengths come out at the end. With t = W v and a = Wt t,
//
//     u = t / |t|,  v = a / |a|,  sigma = ut W v = |a| / |t|.
//
// t and a are kept in float, so a matrix whose norm is far from 1 would leave its range. There both are computed again
// from vectors scaled by a power of two that brings the largest |W| near 1, which changes no digit.
#pragma once

#include <cmath>

#include "afd/common.h"

namespace afd {

struct SpectralMatrix {
  const float* weight;  // [rows, columns]
  const float* u;       // [rows]
  const float* v;       // [columns]
  float* u_out;         // [rows], apart from u
  float* v_out;         // [columns], apart from v
  int64_t rows, columns;
};

struct SpectralNorm {
  const SpectralMatrix* matrices;
  int count;
  int n_iter;
  float eps;
  bool u_first;
  float* sigma;      // [count]
  float* workspace;  // spectral_norm_workspace floats for each
};

// A matrix is cut into bands of rows, by its shape alone: each adds up its own share of Wt t, and the shares are added
// in order, so that results depend on neither threads nor timing.
constexpr int kMostBands = 16;
constexpr int64_t kBandElements = 8192;

AFD_HOST_DEVICE int64_t band_rows(int64_t rows, int64_t columns) {
  const int64_t by_size = (kBandElements + columns - 1) / columns, by_count = (rows + kMostBands - 1) / kMostBands;
  return by_size > by_count ? by_size : by_count;
}

AFD_HOST_DEVICE int bands_of(int64_t rows, int64_t columns) {
  const int64_t each = band_rows(rows, columns);
  return static_cast<int>((rows + each - 1) / each);
}

// Floats of one matrix: t [rows], then a share of a [columns] for each band; and a counter, on the GPU.
AFD_HOST_DEVICE int64_t spectral_norm_workspace(int64_t rows, int64_t columns) {
  return 1 + rows + bands_of(rows, columns) * columns;
}

// What a sum of squares can be while float has neither overflown nor lost what matters on the way; NaN is not.
AFD_HOST_DEVICE bool in_range(double squares) { return squares > 1e-20 && squares < 1e30; }

// The power of two that brings `largest` into [1, 2), as far as float has it.
AFD_HOST_DEVICE float power_that_scales(float largest) {
  const int exponent = ((bits_of(largest) >> 23) & 0xff) - 127;  // of a denormal: -127
  const int back = -exponent > 126 ? 126 : -exponent;
  return float_of((back < -126 ? 0 : back + 127) << 23);
}

AFD_HOST_DEVICE float kept_sigma(double sigma, float eps) {
  return (sigma < 0 ? -sigma : sigma) <= eps ? eps : static_cast<float>(sigma);
}

namespace cpu {
void spectral_norm(const SpectralNorm& args, Launch launch);
}
namespace cuda {
int spectral_norm(const SpectralNorm& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
