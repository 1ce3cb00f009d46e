// The head of a projection discriminator (Miyato & Koyama 2018), both of its matrices spectral-normalised, per sample
// i:
//
//     score = h.w / sigma_w + b + h.e_y / sigma_e
//
// and its gradients, with g the score's and G that of the scaled matrix, G_w = sum g h and G_e[y] = sum of g h over the
// samples of class y:
//
//     dh = g (w / sigma_w + e_y / sigma_e),    dW = (G - (<G, W> / sigma) u vt) / sigma  for W = w and W = e.
//
// G is summed in the order of the samples, whoever computes it: equal calls give equal bits. A label that names no row
// of e makes its score and its dh NaN, and moves no row.
#pragma once

#include "afd/common.h"

namespace afd {

// A matrix that is used divided by its sigma, and what sigma adds to its gradient.
struct Normalised {
  const float* weight;  // [rows, width]
  const float* sigma;   // one number
  const float* u;       // [rows]
  const float* v;       // [width]
};

struct ProjectionLogits {
  const float* h;     // [samples, width]
  const float* w;     // [width]
  const float* bias;  // one number, or null
  const float* sigma_w;
  const int64_t* y;  // [samples], or null: no class term
  const float* e;    // [classes, width]
  const float* sigma_e;
  float* score;  // [samples]
  int64_t samples, width, classes;
};

struct ProjectionLogitsBackward {
  const float* grad;  // [samples]
  const float* h;     // [samples, width]
  Normalised w;       // one row
  const int64_t* y;   // [samples], or null: e is not read and de not written
  Normalised e;       // `classes` rows
  float* dh;          // [samples, width]
  float* dw;          // [width]
  float* db;          // one number
  float* de;          // [classes, width]
  double* workspace;  // projection_logits_workspace doubles
  int64_t samples, width, classes;
};

// The width is cut into strips: one thread (or block) owns a strip of every tensor.
constexpr int64_t kStrip = 64;

AFD_HOST_DEVICE int64_t strips_of(int64_t width) { return (width + kStrip - 1) / kStrip; }

// Each strip's part of <G_w, w> and of <G_e, e>: on the GPU class by class, on the CPU two numbers.
AFD_HOST_DEVICE int64_t projection_logits_workspace(int64_t width, int64_t classes) {
  return strips_of(width) * (classes + 2);
}

AFD_HOST_DEVICE bool names_a_row(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

AFD_HOST_DEVICE float through_sigma(float grad, float along, float v, float inverse) {
  return (grad - along * v) * inverse;  // along is <G, W> / sigma times the row's u
}

namespace cpu {
void projection_logits(const ProjectionLogits& args, Launch launch);
void projection_logits_backward(const ProjectionLogitsBackward& args, Launch launch);
}  // namespace cpu
namespace cuda {
int projection_logits(const ProjectionLogits& args, Launch launch);  // a cudaError_t, as is the next one's result
int projection_logits_backward(const ProjectionLogitsBackward& args, Launch launch);
}  // namespace cuda

}  // namespace afd
