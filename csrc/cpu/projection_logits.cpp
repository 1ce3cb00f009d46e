// The projection head on the CPU. Forward: reads h once, a thread some samples. Backward: reads h and writes dh; a
// thread owns strips of the width, in which it walks all samples in order, so that the rows of de that samples share
// are summed without locks and always alike. A second, short pass takes sigma's share off dw and de. Compiled once per
// instruction set (AFD_ISA).

#include "afd/projection_logits.h"

#include "cpu/rows.h"
#include "cpu/vectors.h"

namespace afd::cpu::AFD_ISA {
namespace {

const float kNaN = __builtin_nanf("");

void pass_strip(const ProjectionLogitsBackward& args, int64_t strip) {
  const int64_t begin = strip * kStrip, columns = args.width - begin < kStrip ? args.width - begin : kStrip;
  const float to_w = 1.0f / *args.w.sigma, to_e = args.y ? 1.0f / *args.e.sigma : 0.0f;
  float* dw = args.dw + begin;
  for (int64_t j = 0; j < columns; ++j) dw[j] = 0.0f;
  for (int64_t c = 0; args.y && c < args.classes; ++c)
    for (int64_t j = 0; j < columns; ++j) args.de[c * args.width + begin + j] = 0.0f;
  const float* w = args.w.weight + begin;
  for (int64_t i = 0; i < args.samples; ++i) {
    const float g = args.grad[i];
    const float* h = args.h + i * args.width + begin;
    float* dh = args.dh + i * args.width + begin;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      dw[j] += g * h[j];
      dh[j] = g * (w[j] * to_w);
    }
    if (!args.y) continue;
    if (!names_a_row(args.y[i], args.classes)) {
      for (int64_t j = 0; j < columns; ++j) dh[j] = kNaN;
      continue;
    }
    const float* e = args.e.weight + args.y[i] * args.width + begin;
    float* de = args.de + args.y[i] * args.width + begin;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      de[j] += g * h[j];
      dh[j] += g * (e[j] * to_e);
    }
  }
}

double product_in_strip(const float* grad, const float* weight, int64_t columns) {
  return sum_of(columns, [=](int64_t j) { return static_cast<double>(grad[j]) * static_cast<double>(weight[j]); });
}

// sum over strips of the workspace's `count` entries a strip, from `first` on.
double total(const double* workspace, int64_t strips, int64_t stride, int64_t first, int64_t count) {
  double sum = 0.0;
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t k = 0; k < count; ++k) sum += workspace[strip * stride + first + k];
  return sum;
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
  const int64_t strips = strips_of(args.width), classes = args.y ? args.classes : 0, stride = args.classes + 1;
  for_each_row(threads, strips, args.samples * kStrip, [&args, classes, stride](int64_t strip) {
    pass_strip(args, strip);
    const int64_t begin = strip * kStrip, columns = args.width - begin < kStrip ? args.width - begin : kStrip;
    double* own = args.workspace + strip * stride;
    own[0] = product_in_strip(args.dw + begin, args.w.weight + begin, columns);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * args.width + begin;
      own[1 + c] = product_in_strip(args.de + at, args.e.weight + at, columns);
    }
  });
  take_off(args.w, total(args.workspace, strips, stride, 0, 1), args.dw, 0, args.width);
  const double of_e = total(args.workspace, strips, stride, 1, classes);
  for_each_row(threads, classes, args.width,
               [&args, of_e](int64_t c) { take_off(args.e, of_e, args.de, c, args.width); });
  *args.db = static_cast<float>(sum_of(args.samples, [&args](int64_t i) { return static_cast<double>(args.grad[i]); }));
}

}  // namespace afd::cpu::AFD_ISA
