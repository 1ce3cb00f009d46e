#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "afd/l1_threshold.h"

#ifdef COUNT
static long passes[3];
#define PASS(k) passes[k]++
#else
#define PASS(k)
#endif
#ifndef SIGMAS
#define SIGMAS 4.0
#endif
#ifndef GTOL
#define GTOL 0.1
#endif
#ifndef MB
#define MB 32
#endif

namespace afd::cpu::AFD_ISA {

constexpr int kVector = 16;  // elements handled at once: one AVX-512 register of them
constexpr int kBlock = 4 * kVector;

inline int64_t keep_above(float bound, const float* size, const float* room, float* sizes, float* rooms) {
#if defined(__AVX512F__)
  const __m512 all = _mm512_loadu_ps(size);
  const __mmask16 above = _mm512_cmp_ps_mask(all, _mm512_set1_ps(bound), _CMP_NLE_UQ);
  _mm512_storeu_ps(sizes, _mm512_maskz_compress_ps(above, all));
  _mm512_storeu_ps(rooms, _mm512_maskz_compress_ps(above, _mm512_loadu_ps(room)));
  return __builtin_popcount(above);
#else
  int64_t kept = 0;
  for (int i = 0; i < kVector; ++i) {
    sizes[kept] = size[i];
    rooms[kept] = room[i];
    kept += !(size[i] <= bound);
  }
  return kept;
#endif
}

struct L1Pass {
  double sum;
  int64_t sloping;
  int32_t largest;
};

struct L1Sample {
  const float* x_adv;
  const float* x;
  int64_t count;
  float low, high;
};

class L1Active {
 public:
  explicit L1Active(const L1Sample& s) : s(s) {}

  // f and slope at lambda.
  L1Pass at(double lambda) {
    const L1Cut cut = l1_cut(lambda);
    if (whole_ && from_ <= lambda) return held(cut);
    from_ = cut.tail < 0.0f ? float_of(bits_of(cut.head) - 1) : cut.head;
    L1Pass sum = {0.0, 0, 0};
    int64_t begin = 0;
    for (;;) {
      count_ = 0;
      whole_ = begin == 0;
      begin = add(begin, s.count);
      const L1Pass part = held(cut);
      sum = {sum.sum + part.sum, sum.sloping + part.sloping, sum.largest > part.largest ? sum.largest : part.largest};
      if (begin >= s.count) return sum;
    }
  }

  double solve(float eps, double start, double tolerance) {
    L1Pass pass = at(start);
    if (start == 0.0 && fabs(pass.sum - eps) <= 1e-6 * eps) pass.sum = exactly();
    L1Threshold search(eps, pass.sum, pass.sloping, float_of(pass.largest), start, tolerance);
    PASS(s.count && tolerance < 1e-3);
    while (search.searching()) {
      PASS(tolerance < 1e-3);
      pass = at(search.lambda());
      search.add(pass.sum, pass.sloping);
    }
    slope_ = pass.sloping;
    return search.lambda();
  }

  float guess(float eps) {
    const int64_t blocks = s.count / 128 < MB ? s.count / 128 : MB;
    if (blocks < 6) return 0.0f;
    count_ = 0;
    from_ = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = s.count / 16 * b / blocks * 16;
      add(first, first + 16);
    }
    whole_ = true;
    const float share = eps * static_cast<float>(16 * blocks) / static_cast<float>(s.count);
    double g = solve(share, 0.0, GTOL);
    whole_ = false;
    if (!(g > 0.0)) return 0.0f;
    g -= SIGMAS * share / (slope_ * sqrt(slope_));
    return g > 0.0 && g < kInfinity ? g : 0.0f;
  }

 private:
  static constexpr int64_t kMost = 8192;

  int64_t add(int64_t begin, int64_t end) {
    const float* __restrict x_adv = s.x_adv;
    const float* __restrict x = s.x;
    const float low = s.low, high = s.high, from = from_;
    int64_t count = count_, i = begin;
    for (; i + kVector <= end && count <= kMost; i += kVector) {
      alignas(64) float size[kVector], room[kVector];
#pragma omp simd
      for (int k = 0; k < kVector; ++k) {
        const float u = x_adv[i + k] - x[i + k];
        size[k] = fabsf(u);
        room[k] = l1_room(u, x[i + k], low, high);
      }
      count += keep_above(from, size, room, size_ + count, room_ + count);
    }
    for (; i < end && count <= kMost; ++i) {
      const float u = x_adv[i] - x[i];
      size_[count] = fabsf(u);
      room_[count] = l1_room(u, x[i], low, high);
      count += !(size_[count] <= from);
    }
    count_ = count;
    for (int k = 0; k < kBlock; ++k) size_[count + k] = room_[count + k] = 0.0f;
    return i;
  }

  L1Pass held(L1Cut cut) const { return sum(size_, room_, (count_ + kBlock - 1) / kBlock * kBlock, cut); }

  static L1Pass sum(const float* __restrict size, const float* __restrict room, int64_t count, L1Cut cut) {
    double sums[kVector] = {};
    int sloping[kVector] = {}, largest[kVector] = {};
    const float head = cut.head, tail = cut.tail;
    for (int64_t i = 0; i < count; i += kBlock) {
#pragma omp simd
      for (int k = 0; k < kVector; ++k) {
        float kept[4];
        for (int j = 0; j < 4; ++j) {
          const float s = size[i + j * kVector + k], r = room[i + j * kVector + k];
          const float over = (s - head) - tail;
          const float excess = over > 0.0f ? over : 0.0f;
          kept[j] = excess < r ? excess : r;
          sloping[k] += (over > 0.0f) & (over < r);
          const int32_t bits = bits_of(s);
          largest[k] = largest[k] > bits ? largest[k] : bits;
        }
        sums[k] += static_cast<double>((kept[0] + kept[1]) + (kept[2] + kept[3]));
      }
    }
    L1Pass all = {0.0, 0, 0};
    for (int k = 0; k < kVector; ++k) {
      all.sum += sums[k];
      all.sloping += sloping[k];
      all.largest = all.largest > largest[k] ? all.largest : largest[k];
    }
    return all;
  }

  double exactly() const {
    return sum_of(s.count, [=, this](int64_t i) {
      const float u = s.x_adv[i] - s.x[i];
      return min_of(l1_room(u, s.x[i], s.low, s.high), fabsf(u));
    });
  }

  const L1Sample& s;
  int64_t count_ = 0, slope_ = 0;
  float from_ = 0.0f;
  bool whole_ = false;
  alignas(64) float size_[kMost + kBlock];
  alignas(64) float room_[kMost + kBlock];
};

inline double l1_lambda(const float* x_adv, const float* x, int64_t count, float eps, float low, float high) {
  const L1Sample s = {x_adv, x, count, low, high};
  L1Active active(s);
  const float start = active.guess(eps);
  if (start > 0.0f) {
    const double lambda = active.solve(eps, start, 6e-7);
    if (lambda != 0.0) return lambda;
  }
  PASS(2);
  return active.solve(eps, 0.0, 6e-7);
}
}
