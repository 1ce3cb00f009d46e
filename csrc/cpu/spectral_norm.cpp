// The power iteration of a whole group on the CPU. An iteration must read each matrix once, and does: four rows at a
// time meet v, and are added up, weighted by what came out, while they are in the nearest cache. Threads share the
// bands of all matrices (spectral_norm.h); a second, short pass adds up each matrix's shares and sets u, v and sigma.
//
// The order in which v comes first needs two passes, and so do matrices whose products leave float's range: these go
// one matrix a thread (`carefully`). Without an iteration, sigma takes the first half of the pass. Compiled once per
// instruction set (AFD_ISA).

#include "afd/spectral_norm.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/vectors.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // elements below which waking another thread costs more than it saves

double dot(const float* a, const float* b, int64_t count) {
  return sum_of(count, [=](int64_t i) { return static_cast<double>(a[i]) * static_cast<double>(b[i]); });
}

double squares_of(const float* vector, int64_t count) { return dot(vector, vector, count); }

void scaled_into(float* out, const float* vector, int64_t count, double factor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<double>(vector[i]) * factor);
}

// --- One matrix, unhurried -------------------------------------------------------------------------------------------

float largest_of(const float* weight, int64_t count) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = max_of(fabsf(weight[i]), largest);
  return largest;
}

// In one matrix's workspace: products with the rows [rows], then a scaled vector or a sum of rows [columns].
struct Careful {
  const SpectralMatrix& m;
  float* products;
  float* sums;
  float eps;
  float scale;

  void multiply_v() const {  // products = W (scale v)
    scaled_into(sums, m.v_out, m.columns, scale);
    by_fours(m.rows, [this](auto four, int64_t r) {
      dot_rows<decltype(four)::value>(m.weight + r * m.columns, sums, m.columns, products + r);
    });
  }

  void multiply_u() const {  // sums = Wt (scale u)
    scaled_into(products, m.u_out, m.rows, scale);
    for (int64_t j = 0; j < m.columns; ++j) sums[j] = 0.0f;
    by_fours(m.rows, [this](auto four, int64_t r) {
      add_rows<decltype(four)::value>(m.weight + r * m.columns, products + r, m.columns, sums);
    });
  }

  void follow(float* vector, const float* successor, int64_t count) const {
    const double length = sqrt(squares_of(successor, count));
    if (length / scale > eps) scaled_into(vector, successor, count, 1.0 / length);
  }

  void step_u() const {
    multiply_v();
    follow(m.u_out, products, m.rows);
  }

  void step_v() const {
    multiply_u();
    follow(m.v_out, sums, m.columns);
  }

  float sigma() const {
    multiply_v();
    return kept_sigma(dot(m.u_out, products, m.rows) / scale, eps);
  }
};

// n_iter iterations from u_out and v_out as they are; returns sigma.
float carefully(const SpectralMatrix& m, float* workspace, int n_iter, bool u_first, float eps) {
  const float scale = power_that_scales(largest_of(m.weight, m.rows * m.columns));
  const Careful careful{m, workspace, workspace + m.rows, eps, scale};
  for (int i = 0; i < n_iter; ++i) {
    if (u_first) careful.step_u();
    careful.step_v();
    if (!u_first) careful.step_u();
  }
  return careful.sigma();
}

// --- The group, in one pass an iteration -----------------------------------------------------------------------------

// t = W v in the band's rows, and, where u and v move, the band's share of Wt t.
template <bool kMoves>
void pass_band(const SpectralMatrix& m, int band, float* workspace) {
  const int64_t each = band_rows(m.rows, m.columns), first = band * each;
  const int64_t rows = first + each < m.rows ? each : m.rows - first;
  float* share = workspace + m.rows + band * m.columns;
  for (int64_t j = 0; kMoves && j < m.columns; ++j) share[j] = 0.0f;
  by_fours(rows, [&](auto four, int64_t r) {
    const float* w = m.weight + (first + r) * m.columns;
    float* t = workspace + first + r;
    dot_rows<decltype(four)::value>(w, m.v_out, m.columns, t);
    if (kMoves) add_rows<decltype(four)::value>(w, t, m.columns, share);
  });
}

// u, v and sigma from what the bands left.
float move(const SpectralMatrix& m, float* workspace, float eps) {
  const int bands = bands_of(m.rows, m.columns);
  float* t = workspace;
  float* a = workspace + m.rows;
  for (int band = 1; band < bands; ++band) {
    const float* share = a + band * m.columns;
#pragma omp simd
    for (int64_t j = 0; j < m.columns; ++j) a[j] += share[j];
  }
  const double tt = squares_of(t, m.rows), aa = squares_of(a, m.columns);
  const double sigma = sqrt(aa / tt);
  if (!(in_range(tt) && in_range(aa) && sqrt(tt) > eps && sigma > eps)) return carefully(m, workspace, 1, true, eps);
  scaled_into(m.u_out, t, m.rows, 1.0 / sqrt(tt));
  scaled_into(m.v_out, a, m.columns, 1.0 / sqrt(aa));
  return static_cast<float>(sigma);
}

float stay(const SpectralMatrix& m, float* workspace, float eps) {
  const float* t = workspace;
  if (!in_range(squares_of(t, m.rows))) return carefully(m, workspace, 0, true, eps);
  return kept_sigma(dot(m.u_out, t, m.rows), eps);
}

float* workspace_of(const SpectralNorm& args, int matrix) {
  float* workspace = args.workspace;
  for (int i = 0; i < matrix; ++i)
    workspace += spectral_norm_workspace(args.matrices[i].rows, args.matrices[i].columns);
  return workspace;
}

int64_t elements_of(const SpectralNorm& args) {
  int64_t elements = 0;
  for (int i = 0; i < args.count; ++i) elements += args.matrices[i].rows * args.matrices[i].columns;
  return elements;
}

// body(matrix) for each, one thread a matrix. Evens go before odds: neighbours are often of one size, and threads take
// ranges.
template <class Body>
void each_matrix(const SpectralNorm& args, int threads, const Body& body) {
  const int64_t grain = elements_of(args) < kGrain ? args.count : 1, evens = (args.count + 1) / 2;
  parallel_for(threads, args.count, grain, [&body, evens](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i < evens ? 2 * i : 2 * (i - evens) + 1));
  });
}

template <bool kMoves>
void sweep(const SpectralNorm& args, int threads) {
  int64_t items = 0;
  for (int i = 0; i < args.count; ++i) items += bands_of(args.matrices[i].rows, args.matrices[i].columns);
  const int64_t grain = elements_of(args) < kGrain ? items : 1;
  parallel_for(threads, items, grain, [&args](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int i = 0; i < args.count && first < end; ++i) {
      const SpectralMatrix& m = args.matrices[i];
      const int bands = bands_of(m.rows, m.columns);
      for (int band = 0; band < bands; ++band)
        if (first + band >= begin && first + band < end) pass_band<kMoves>(m, band, workspace_of(args, i));
      first += bands;
    }
  });
  each_matrix(args, threads, [&args](int i) {
    args.sigma[i] = (kMoves ? move : stay)(args.matrices[i], workspace_of(args, i), args.eps);
  });
}

}  // namespace

void spectral_norm(const SpectralNorm& args, int threads) {
  for (int i = 0; i < args.count; ++i) {
    const SpectralMatrix& m = args.matrices[i];
    memcpy(m.u_out, m.u, sizeof(float) * m.rows);
    memcpy(m.v_out, m.v, sizeof(float) * m.columns);
  }
  if (args.n_iter == 0) return sweep<false>(args, threads);
  for (int i = 0; args.u_first && i < args.n_iter; ++i) sweep<true>(args, threads);
  if (!args.u_first)
    each_matrix(args, threads, [&args](int i) {
      args.sigma[i] = carefully(args.matrices[i], workspace_of(args, i), args.n_iter, false, args.eps);
    });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(spectral_norm, SpectralNorm)
