// The nearest point of a plane within the box, on the CPU: one thread a sample, which stays in its cache while a search
// (project_plane.h) asks for sums over it. It reads x, w and at and writes out, 16 bytes an element, its floor; the
// passes between are arithmetic in double, on blocks that are widened first. Sums go over a fixed number of columns, so
// results depend on neither threads, batch nor vector width. Compiled once per instruction set (AFD_ISA); dispatch.cpp
// picks one.

#include "afd/project_plane.h"

#include "cpu/dispatch.h"
#include "cpu/rows.h"
#include "cpu/sums.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int kColumns = 16, kRows = 4, kWidened = kColumns * kRows;

// kWidened neighbours in double. Behind the sample's last one they weigh nothing.
struct Widened {
  double place[kWidened], fall[kWidened];

  AFD_HOST_DEVICE_MEMBER void read(const PlaneRow& r, int64_t first, double sign) {
    const float* __restrict x = r.x + first;
    const float* __restrict w = r.w + first;
    const float low = r.low, high = r.high;
    const int count = count_from(r, first);
    if (count == kWidened) {
#pragma omp simd
      for (int k = 0; k < kWidened; ++k) place[k] = clamped(x[k], low, high);
#pragma omp simd
      for (int k = 0; k < kWidened; ++k) fall[k] = sign * w[k];
      return;
    }
    for (int k = 0; k < kWidened; ++k) {
      place[k] = k < count ? clamped(x[k], low, high) : 0.0;
      fall[k] = k < count ? sign * w[k] : 0.0;
    }
  }

  static int count_from(const PlaneRow& r, int64_t first) {
    return static_cast<int>(r.elements - first < kWidened ? r.elements - first : kWidened);
  }
};

inline double total(const double* columns) {
  double sum = 0.0;
  for (int column = 0; column < kColumns; ++column) sum += columns[column];
  return sum;
}

inline double largest(const double* columns) {
  double most = 0.0;
  for (int column = 0; column < kColumns; ++column) most = larger_of(most, columns[column]);
  return most;
}

// --- Linf and L2 -----------------------------------------------------------------------------------------------------

template <Norm kNorm>
void add_sums(const PlaneRow& r, double sign, PlaneRoot& search) {
  const double low = r.low, high = r.high, t = search.t();
  double sums[kColumns] = {}, slopes[kColumns] = {};
  Widened block;
  for (int64_t i = 0; i < r.elements; i += kWidened) {
    block.read(r, i, sign);
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) {
      double sum[kRows], slope[kRows];
      for (int row = 0; row < kRows; ++row) {
        const double fall = block.fall[row * kColumns + column];
        const double room = plane_room(block.place[row * kColumns + column], fall, low, high);
        const double reach = plane_reach<kNorm>(t, fall);
        sum[row] = fabs(fall) * lesser_of(reach, room);
        slope[row] = plane_slope<kNorm>(fall, reach, room);
      }
      sums[column] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      slopes[column] += (slope[0] + slope[1]) + (slope[2] + slope[3]);
    }
  }
  search.add(total(sums), total(slopes));
}

// --- L1 --------------------------------------------------------------------------------------------------------------

PlaneReaching reaching(const PlaneRow& r, double sign, double probe) {
  const double low = r.low, high = r.high;
  double sums[kColumns] = {}, least[kColumns], below[kColumns] = {};
  for (double& size : least) size = kInfinity;
  Widened block;
  for (int64_t i = 0; i < r.elements; i += kWidened) {
    block.read(r, i, sign);
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) {
      double sum[kRows], above[kRows], under[kRows];
      for (int row = 0; row < kRows; ++row) {
        const double fall = block.fall[row * kColumns + column], size = fabs(fall);
        const double room = plane_room(block.place[row * kColumns + column], fall, low, high);
        sum[row] = size >= probe ? size * room : 0.0;
        above[row] = size >= probe ? size : kInfinity;
        under[row] = size >= probe ? 0.0 : size;
      }
      sums[column] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int row = 0; row < kRows; ++row) {
        least[column] = lesser_of(least[column], above[row]);
        below[column] = larger_of(below[column], under[row]);
      }
    }
  }
  double smallest = kInfinity;
  for (double size : least) smallest = lesser_of(smallest, size);
  return {total(sums), smallest, largest(below)};
}

double tied(const PlaneRow& r, double sign, PlaneSteepest steepest) {
  return sum_of(r.elements, [=](int64_t i) {
    const double place = clamped(r.x[i], r.low, r.high), fall = sign * r.w[i];
    return plane_tied(steepest, fall, plane_room(place, fall, r.low, r.high));
  });
}

// Without a cut, where even all of them do not reach the plane, each goes as far as its room.
PlaneSteepest steepest_of(const PlaneRow& r, double sign, double need) {
  const PlaneReaching all = reaching(r, sign, kLeastFloat);
  if (!(all.sum >= need)) return {0.0, 0.0, 0.0};
  PlaneCut search(need, all);
  while (search.searching()) search.add(reaching(r, sign, search.probe()));
  PlaneSteepest steepest = {search.cut(), search.tied_move(), 1.0};
  const double most = tied(r, sign, steepest);
  if (steepest.together < most) steepest.share = steepest.together / most;
  return steepest;
}

// --- The sample ------------------------------------------------------------------------------------------------------

// Writes the elements as far as move(fall, room) takes them; their distance.
template <Norm kNorm, class Move>
inline double write_moved(const PlaneRow& r, double sign, const Move& move) {
  const double low = r.low, high = r.high;
  double lengths[kColumns] = {};
  Widened block;
  for (int64_t i = 0; i < r.elements; i += kWidened) {
    block.read(r, i, sign);
    double moved[kWidened];
    float out[kWidened];
#pragma omp simd
    for (int k = 0; k < kWidened; ++k) {
      const double place = block.place[k], fall = block.fall[k];
      moved[k] = plane_moved(place, fall, move(fall, plane_room(place, fall, low, high)));
    }
#pragma omp simd
    for (int k = 0; k < kWidened; ++k) out[k] = clamped(static_cast<float>(moved[k]), r.low, r.high);
    for (int k = Widened::count_from(r, i); k < kWidened; ++k) block.place[k] = out[k];
#pragma omp simd
    for (int k = 0; k < kWidened; ++k) moved[k] = plane_length<kNorm>(block.place[k], out[k]);
#pragma omp simd
    for (int column = 0; column < kColumns; ++column) {
      const double *a = moved + column, *b = a + kColumns, *c = b + kColumns, *d = c + kColumns;
      if (kNorm == Norm::linf)
        lengths[column] = larger_of(lengths[column], larger_of(larger_of(*a, *b), larger_of(*c, *d)));
      else
        lengths[column] += (*a + *b) + (*c + *d);
    }
    std::memcpy(r.out + i, out, sizeof(float) * static_cast<size_t>(Widened::count_from(r, i)));
  }
  if (kNorm == Norm::linf) return largest(lengths);
  return kNorm == Norm::l2 ? sqrt(total(lengths)) : total(lengths);
}

template <Norm kNorm>
double project_row(const PlaneRow& r, float b) {
  const double value = b + sum_of(r.elements, [=](int64_t i) {
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
  const double sign = value > 0.0 ? 1.0 : -1.0, need = fabs(value);
  if constexpr (kNorm == Norm::l1) {
    const PlaneSteepest steepest = steepest_of(r, sign, need);
    return write_moved<kNorm>(r, sign, [=](double fall, double room) __attribute__((always_inline)) {
      return plane_steepest_move(steepest, fall, room);
    });
  } else {
    PlaneRoot search(need);
    while (search.searching()) add_sums<kNorm>(r, sign, search);
    const double t = search.t();
    return write_moved<kNorm>(r, sign, [=](double fall, double room) __attribute__((always_inline)) {
      return lesser_of(plane_reach<kNorm>(t, fall), room);
    });
  }
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
