// Finds lambda of one sample's L1 projection on the CPU (the search itself: l1_threshold.h). A pass at lambda needs
// only the elements with |u| > lambda, and near the answer few are left: a tenth of dense noise, less of a sparse step.
// So one pass over the sample packs |u| and room of those above a lower bound of lambda, and Newton's passes then run
// over what was packed, which stays in the first cache.
//
// The bound comes from an excerpt, vectors spread evenly over the sample: its own lambda, less four standard errors.
// It is a guess and is treated as one: if f(bound) > eps it was a lower bound, whatever the excerpt missed, and f over
// the packed elements is f over all of them, float for float. If not, the search starts again at 0. Where more is above
// the bound than fits, each pass packs the sample anew, part by part.
//
// Packing keeps order, and sums go by position among the packed: results depend on neither threads, batch nor vector
// width.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>

#include "afd/l1_threshold.h"
#include "cpu/sums.h"

namespace afd::cpu::AFD_ISA {

constexpr int kVector = 16;          // elements packed at once
constexpr int kBlock = 4 * kVector;  // elements summed at once
constexpr int64_t kAhead = 2048;     // elements that packing prefetches ahead: hardware stops at the end of a page

struct L1Sample {
  const float* x_adv;
  const float* x;
  int64_t count;
  float low, high;
};

struct L1Pass {
  double sum;
  int64_t sloping;
  int32_t largest;  // the bits of max |u|, which order as the floats do, and NaN above infinity
};

// Copies those sizes that are not <= bound (NaN is not), and their rooms, to the front of `sizes` and `rooms`, where
// kVector of each may be overwritten. Returns how many.
inline int pack_above(float bound, const float* size, const float* room, float* sizes, float* rooms) {
#if defined(__AVX512F__)
  const __m512 all = _mm512_loadu_ps(size);
  const __mmask16 above = _mm512_cmp_ps_mask(all, _mm512_set1_ps(bound), _CMP_NLE_UQ);
  _mm512_storeu_ps(sizes, _mm512_maskz_compress_ps(above, all));
  _mm512_storeu_ps(rooms, _mm512_maskz_compress_ps(above, _mm512_loadu_ps(room)));
  return __builtin_popcount(above);
#else
  int packed = 0;
  for (int i = 0; i < kVector; ++i) {
    sizes[packed] = size[i];
    rooms[packed] = room[i];
    packed += !(size[i] <= bound);
  }
  return packed;
#endif
}

// One pass over `count` elements, a multiple of kBlock. A block is four vectors of columns, added in float as a tree,
// so that only their sums are widened to double.
inline L1Pass l1_pass(const float* __restrict size, const float* __restrict room, int64_t count, L1Cut cut) {
  double sums[kVector] = {};
  int sloping[kVector] = {}, largest[kVector] = {};
  for (int64_t i = 0; i < count; i += kBlock) {
#pragma omp simd
    for (int column = 0; column < kVector; ++column) {
      float kept[4];
      for (int row = 0; row < 4; ++row) {
        const int64_t k = i + row * kVector + column;
        const L1Term term = l1_term(l1_over(size[k], cut), room[k]);
        kept[row] = term.kept;
        sloping[column] += term.sloping;
        const int32_t bits = bits_of(size[k]);
        largest[column] = largest[column] > bits ? largest[column] : bits;
      }
      sums[column] += static_cast<double>((kept[0] + kept[1]) + (kept[2] + kept[3]));
    }
  }
  for (int half = kVector / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int column = 0; column < half; ++column) {
      sums[column] += sums[column + half];
      sloping[column] += sloping[column + half];
      largest[column] = largest[column] > largest[column + half] ? largest[column] : largest[column + half];
    }
  }
  return {sums[0], sloping[0], largest[0]};
}

// The elements of a sample above a bound, packed as far as they fit.
class L1Active {
 public:
  explicit L1Active(const L1Sample& sample) : sample_(sample) {}

  // f and its slope at lambda, from what is packed or, where that does not cover it, packed anew.
  L1Pass at(double lambda) {
    const L1Cut cut = l1_cut(lambda);
    if (covers_ && bound_ <= lambda) return packed_pass(cut);
    bound_ = cut.tail < 0.0f ? float_of(bits_of(cut.head) - 1) : cut.head;  // the last float that is not above lambda
    L1Pass sum = {0.0, 0, 0};
    int64_t done = 0;
    do {
      covers_ = done == 0;
      packed_ = 0;
      done = pack(done, sample_.count);
      const L1Pass part = packed_pass(cut);
      sum.sum += part.sum;
      sum.sloping += part.sloping;
      sum.largest = sum.largest > part.largest ? sum.largest : part.largest;
    } while (done < sample_.count);
    return sum;
  }

  // Packs `vectors` vectors, spread evenly, to stand for the sample until release().
  void hold_excerpt(int64_t vectors) {
    packed_ = 0;
    bound_ = 0.0f;
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t first = sample_.count / kVector * i / vectors * kVector;
      pack(first, first + kVector);
    }
    covers_ = true;
  }

  void release() { covers_ = false; }

 private:
  static constexpr int64_t kMost = 8192;

  // Packs [begin, end) behind what is there, until it is full; returns where it stopped.
  int64_t pack(int64_t begin, int64_t end) {
    const float* __restrict x_adv = sample_.x_adv;
    const float* __restrict x = sample_.x;
    const float low = sample_.low, high = sample_.high, bound = bound_;
    int64_t packed = packed_, i = begin;
    for (; i + kVector <= end && packed <= kMost; i += kVector) {
      alignas(64) float size[kVector], room[kVector];
      __builtin_prefetch(x_adv + i + kAhead, 0, 2);
      __builtin_prefetch(x + i + kAhead, 0, 2);
#pragma omp simd
      for (int k = 0; k < kVector; ++k) {
        const float u = x_adv[i + k] - x[i + k];
        size[k] = fabsf(u);
        room[k] = l1_room(u, x[i + k], low, high);
      }
      packed += pack_above(bound, size, room, size_ + packed, room_ + packed);
    }
    for (; i < end && packed <= kMost; ++i) {
      const float u = x_adv[i] - x[i];
      size_[packed] = fabsf(u);
      room_[packed] = l1_room(u, x[i], low, high);
      packed += !(size_[packed] <= bound);
    }
    packed_ = packed;
    return i;
  }

  L1Pass packed_pass(L1Cut cut) {
    for (int i = 0; i < kBlock; ++i) size_[packed_ + i] = room_[packed_ + i] = 0.0f;
    return l1_pass(size_, room_, (packed_ + kBlock - 1) / kBlock * kBlock, cut);
  }

  const L1Sample& sample_;
  bool covers_ = false;  // whether every element above bound_ is packed
  float bound_ = 0.0f;
  int64_t packed_ = 0;
  alignas(64) float size_[kMost + 2 * kBlock];
  alignas(64) float room_[kMost + 2 * kBlock];
};

// Runs a search to its end; `pass` is the last one.
inline double l1_search(L1Active& active, L1Threshold search, L1Pass& pass) {
  while (search.searching()) {
    pass = active.at(search.lambda());
    search.add(pass.sum, pass.sloping);
  }
  return search.lambda();
}

// A lambda that is most likely below the sample's and not far below; 0 where an excerpt is no use.
inline float l1_guess(L1Active& active, int64_t count, float eps) {
  constexpr int64_t kLeast = 6, kMost = 32, kOneIn = 8;
  constexpr double kTolerance = 0.3, kErrors = 4.0;
  const int64_t vectors = count / (kOneIn * kVector) < kMost ? count / (kOneIn * kVector) : kMost;
  if (vectors < kLeast || !(eps > 0.0f)) return 0.0f;
  const float share = eps * static_cast<float>(vectors * kVector) / static_cast<float>(count);
  active.hold_excerpt(vectors);
  L1Pass pass = active.at(0.0);
  const L1Threshold search(share, pass.sum, pass.sloping, float_of(pass.largest), 0.0, kTolerance);
  const double lambda = l1_search(active, search, pass), sloping = static_cast<double>(pass.sloping);
  active.release();
  const double guess = lambda - kErrors * share / (sloping * sqrt(sloping));  // f is off by share / sqrt(sloping)
  return guess > 0.0 && guess < kLargestFloat ? static_cast<float>(guess) : 0.0f;
}

// lambda as L1Threshold defines it: 0 where only the box cuts, NaN where there is no answer.
inline double l1_lambda(const L1Sample& sample, float eps) {
  constexpr double kSure = 1e-6;  // beyond the rounding of a pass
  L1Active active(sample);
  const float start = l1_guess(active, sample.count, eps);
  L1Pass pass = active.at(start);
  if (start > 0.0f && pass.sum > (1.0 + kSure) * eps)
    return l1_search(active, L1Threshold(eps, pass.sum, pass.sloping, float_of(pass.largest), start), pass);
  if (start > 0.0f) pass = active.at(0.0);
  if (fabs(pass.sum - eps) <= kSure * eps) {
    pass.sum = sum_of(sample.count, [=](int64_t i) {
      const float u = sample.x_adv[i] - sample.x[i];
      return min_of(l1_room(u, sample.x[i], sample.low, sample.high), fabsf(u));
    });
  }
  return l1_search(active, L1Threshold(eps, pass.sum, pass.sloping, float_of(pass.largest)), pass);
}

}  // namespace afd::cpu::AFD_ISA
