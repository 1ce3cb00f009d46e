// The nearest point of a plane within the box, on the CPU: one thread a sample, which stays in its cache while a search
// (project_plane.h) asks for sums over it. It reads x, w and at and writes out, 16 bytes an element, its floor; the
// passes between are arithmetic. Sums go over a fixed number of columns, so results depend on neither threads, batch
// nor vector width. Compiled once per instruction set (AFD_ISA); dispatch.cpp picks one.

#include "afd/project_plane.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/sums.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int kColumns = 32;

// body(column, i) for each element, kColumns beside each other.
template <class Body>
inline void in_columns(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kColumns <= count; i += kColumns) {
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) body(column, i + column);
  }
  for (int column = 0; i < count; ++i, ++column) body(column, i);
}

inline double total(const double* columns) {
  double sum = 0.0;
  for (int column = 0; column < kColumns; ++column) sum += columns[column];
  return sum;
}

// Writes the moved elements; the distance.
template <Norm kNorm, class Move>
inline double write_moved(const PlaneRow& r, bool above, const Move& move) {
  double lengths[kColumns] = {};
  in_columns(r.elements, [&](int column, int64_t i) __attribute__((always_inline)) {
    r.out[i] = plane_moved(r.x[i], r.w[i], above, move(i), r.low, r.high);
    const double length = plane_length<kNorm>(r.out[i], r.x[i], r.low, r.high);
    if (kNorm == Norm::linf)
      lengths[column] = lengths[column] > length ? lengths[column] : length;
    else
      lengths[column] += length;
  });
  if (kNorm == Norm::l1) return total(lengths);
  if (kNorm == Norm::l2) return sqrt(total(lengths));
  double largest = 0.0;
  for (double length : lengths) largest = largest > length ? largest : length;
  return largest;
}

template <Norm kNorm>
inline double move_evenly(const PlaneRow& r, bool above, double need) {
  PlaneRoot search(need);
  while (search.searching()) {
    const double t = search.t();
    double sums[kColumns] = {}, slopes[kColumns] = {};
    in_columns(r.elements, [&](int column, int64_t i) __attribute__((always_inline)) {
      const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
      const double reach = plane_reach<kNorm>(t, e.size);
      sums[column] += e.size * plane_move(reach, e.room);
      slopes[column] += plane_slope<kNorm>(e, reach);
    });
    search.add(total(sums), total(slopes));
  }
  const double t = search.t();
  return write_moved<kNorm>(r, above, [&](int64_t i) __attribute__((always_inline)) {
    const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
    return plane_move(plane_reach<kNorm>(t, e.size), e.room);
  });
}

struct CutSums {
  double sum;
  int32_t least, below;  // key
};

inline CutSums sums_reaching(const PlaneRow& r, bool above, int32_t probe) {
  double sums[kColumns] = {};
  int32_t least[kColumns], below[kColumns] = {};
  for (int32_t& key : least) key = 0x7fffffff;
  in_columns(r.elements, [&](int column, int64_t i) __attribute__((always_inline)) {
    const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
    const int32_t key = plane_key(r.w[i]);
    const bool reaches = key >= probe;
    sums[column] += reaches ? e.size * e.room : 0.0;
    least[column] = reaches && key < least[column] ? key : least[column];
    below[column] = !reaches && key > below[column] ? key : below[column];
  });
  CutSums all = {total(sums), least[0], below[0]};
  for (int column = 1; column < kColumns; ++column) {
    all.least = all.least < least[column] ? all.least : least[column];
    all.below = all.below > below[column] ? all.below : below[column];
  }
  return all;
}

inline double move_steepest(const PlaneRow& r, bool above, double need) {
  const CutSums all = sums_reaching(r, above, 1);
  int32_t cut = 0;  // below every weight, where even all of them do not reach the plane
  double together = 0.0, share = 0.0;
  if (all.sum >= need) {
    PlaneCut search(need, all.sum, all.least);
    while (search.searching()) {
      const CutSums sums = sums_reaching(r, above, search.probe());
      search.add(sums.sum, sums.least, sums.below);
    }
    cut = search.key();
    together = search.tied_move();
    const double tied = sum_of(r.elements, [&](int64_t i) __attribute__((always_inline)) {
      const double room = plane_element(r.x[i], r.w[i], above, r.low, r.high).room;
      return plane_key(r.w[i]) == cut ? plane_tied(room, together) : 0.0;
    });
    share = together < tied ? together / tied : 1.0;
  }
  return write_moved<Norm::l1>(r, above, [&](int64_t i) __attribute__((always_inline)) {
    const double room = plane_element(r.x[i], r.w[i], above, r.low, r.high).room;
    return plane_l1_move(plane_key(r.w[i]), cut, room, together, share);
  });
}

template <Norm kNorm>
double project_row(const PlaneRow& r, float b) {
  const double value = b + sum_of(r.elements, [&](int64_t i) __attribute__((always_inline)) {
                         return plane_value(r.x[i], r.w[i], r.at ? r.at[i] : 0.0f, r.low, r.high);
                       });
  if (value == 0.0) {
    clamp_row(r.x, r.out, r.elements, r.low, r.high);
    return 0.0;
  }
  if (!(fabs(value) < __builtin_huge_val())) {
    fill_row(r.out, r.elements, __builtin_nanf(""));
    return __builtin_nan("");
  }
  const bool above = value > 0.0;
  if constexpr (kNorm == Norm::l1)
    return move_steepest(r, above, fabs(value));
  else
    return move_evenly<kNorm>(r, above, fabs(value));
}

}  // namespace

void project_plane(const ProjectPlane& a, int threads) {
  const auto row = a.norm == Norm::linf ? project_row<Norm::linf>
                   : a.norm == Norm::l2 ? project_row<Norm::l2>
                                        : project_row<Norm::l1>;
  for_each_row(threads, a.samples, a.elements, [&a, row](int64_t sample) {
    a.distance[sample] = static_cast<float>(row(plane_row(a, sample), a.b[sample % a.planes]));
  });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(project_plane, ProjectPlane)
