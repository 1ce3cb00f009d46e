// The projection head on the CPU. Forward: reads h once, a thread some samples. Backward: reads h and writes dh; a
// thread owns strips of the width, in which it walks all samples in order, so that the rows of de that samples share
// are summed without locks and always alike. A second, short pass takes sigma's share off dw and de. Compiled once per
// instruction set (AFD_ISA).

#include "afd/projection_logits.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/vectors.h"

namespace afd::cpu::AFD_ISA {
namespace {

const float kNaN = __builtin_nanf("");

struct Strip {
  int64_t begin, columns;
};

Strip strip_of(const ProjectionLogitsBackward& args, int64_t strip) {
  const int64_t begin = strip * kStrip;
  return {begin, args.width - begin < kStrip ? args.width - begin : kStrip};
}

// One sample's part of a strip: dh, and its share of G_w, of its row of G_e, and of the terms of <G_e, e>.
void pass_sample(const Strip& strip, float g, const float* h, const float* w, float to_w, const float* e, float to_e,
                 float* dh, float* dw, float* de, float* terms) {
#pragma omp simd
  for (int64_t j = 0; j < strip.columns; ++j) {
    const float gh = g * h[j];
    dw[j] += gh;
    de[j] += gh;
    terms[j] += gh * e[j];
    dh[j] = g * (w[j] * to_w) + g * (e[j] * to_e);
  }
}

void pass_sample(const Strip& strip, float g, const float* h, const float* w, float to_w, float of_class, float* dh,
                 float* dw) {
#pragma omp simd
  for (int64_t j = 0; j < strip.columns; ++j) {
    dw[j] += g * h[j];
    dh[j] = g * (w[j] * to_w) + of_class;
  }
}

// Leaves <G_w, w> and <G_e, e>, as far as the strip goes, in `products`.
void pass_strip(const ProjectionLogitsBackward& args, const Strip& strip, double* products) {
  const float to_w = 1.0f / *args.w.sigma, to_e = args.y ? 1.0f / *args.e.sigma : 0.0f;
  const float* w = args.w.weight + strip.begin;
  float* dw = args.dw + strip.begin;
  float terms[kStrip] = {};
  for (int64_t j = 0; j < strip.columns; ++j) dw[j] = 0.0f;
  for (int64_t c = 0; args.y && c < args.classes; ++c)
    for (int64_t j = 0; j < strip.columns; ++j) args.de[c * args.width + strip.begin + j] = 0.0f;
  for (int64_t i = 0; i < args.samples; ++i) {
    const int64_t at = i * args.width + strip.begin;
    if (args.y && names_a_row(args.y[i], args.classes)) {
      const int64_t row = args.y[i] * args.width + strip.begin;
      pass_sample(strip, args.grad[i], args.h + at, w, to_w, args.e.weight + row, to_e, args.dh + at, dw, args.de + row,
                  terms);
    } else {
      pass_sample(strip, args.grad[i], args.h + at, w, to_w, args.y ? kNaN : 0.0f, args.dh + at, dw);
    }
  }
  products[0] =
      sum_of(strip.columns, [=](int64_t j) { return static_cast<double>(dw[j]) * static_cast<double>(w[j]); });
  products[1] = sum_of(strip.columns, [&terms](int64_t j) { return static_cast<double>(terms[j]); });
}

void take_off(const Normalised& m, double product, float* grad, int64_t row, int64_t width) {
  const float sigma = *m.sigma, along = static_cast<float>(product / sigma) * m.u[row], inverse = 1.0f / sigma;
  float* own = grad + row * width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) own[j] = through_sigma(own[j], along, m.v[j], inverse);
}

}  // namespace

void projection_logits(const ProjectionLogits& args, int threads) {
  const float to_w = 1.0f / *args.sigma_w, to_e = args.y ? 1.0f / *args.sigma_e : 0.0f;
  const float bias = args.bias ? *args.bias : 0.0f;
  for_each_row(threads, args.samples, args.width, [&, to_w, to_e, bias](int64_t i) {
    const float* h = args.h + i * args.width;
    float product, of_class = 0.0f;
    dot_rows<1>(h, args.w, args.width, &product);
    if (args.y) {
      if (names_a_row(args.y[i], args.classes))
        dot_rows<1>(h, args.e + args.y[i] * args.width, args.width, &of_class);
      else
        of_class = kNaN;
    }
    args.score[i] = product * to_w + bias + of_class * to_e;
  });
}

void projection_logits_backward(const ProjectionLogitsBackward& args, int threads) {
  const int64_t strips = strips_of(args.width);
  for_each_row(threads, strips, args.samples * kStrip,
               [&args](int64_t strip) { pass_strip(args, strip_of(args, strip), args.workspace + 2 * strip); });
  double of_w = 0.0, of_e = 0.0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    of_w += args.workspace[2 * strip];
    of_e += args.workspace[2 * strip + 1];
  }
  take_off(args.w, of_w, args.dw, 0, args.width);
  for_each_row(threads, args.y ? args.classes : 0, args.width,
               [&args, of_e](int64_t c) { take_off(args.e, of_e, args.de, c, args.width); });
  *args.db = static_cast<float>(sum_of(args.samples, [&args](int64_t i) { return static_cast<double>(args.grad[i]); }));
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(projection_logits, ProjectionLogits)
AFD_CPU_KERNEL(projection_logits_backward, ProjectionLogitsBackward)
