// The nearest point of a plane within the box, on the GPU: one block a sample. Where it fits, x and w are read once
// into shared memory and the passes of a search (project_plane.h) run there; a larger sample is walked in place by one
// large block, mostly in the L2 cache. Each thread gets every sum and steers the search by itself: nothing returns to
// the host, and one launch serves points and distances.

#include "afd/project_plane.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

// Calls body(i, place, fall, room) for each element that this thread owns.
template <class Body>
__device__ void for_own_elements(const PlaneRow& r, double sign, const Body& body) {
  for_own(r.elements, [&](int64_t i) {
    const double place = clamped(r.x[i], r.low, r.high), fall = sign * r.w[i];
    body(i, place, fall, plane_room(place, fall, r.low, r.high));
  });
}

template <Norm kNorm>
__device__ void add_sums(const PlaneRow& r, double sign, PlaneRoot& search) {
  const double t = search.t();
  double sum = 0.0, slope = 0.0;
  for_own_elements(r, sign, [&](int64_t, double, double fall, double room) {
    const double reach = plane_reach<kNorm>(t, fall);
    sum += fabs(fall) * lesser_of(reach, room);
    slope += plane_slope<kNorm>(fall, reach, room);
  });
  search.add(block_sum(sum), block_sum(slope));
}

__device__ inline PlaneReaching reaching(const PlaneRow& r, double sign, double probe) {
  double sum = 0.0, least = kInfinity, below = 0.0;
  for_own_elements(r, sign, [&](int64_t, double, double fall, double room) {
    const double size = fabs(fall);
    sum += size >= probe ? size * room : 0.0;
    least = lesser_of(least, size >= probe ? size : kInfinity);
    below = larger_of(below, size >= probe ? 0.0 : size);
  });
  return {block_sum(sum), -block_max(-least), block_max(below)};
}

// Without a cut, where even all of them do not reach the plane, each goes as far as its room.
__device__ inline PlaneSteepest steepest_of(const PlaneRow& r, double sign, double need) {
  const PlaneReaching all = reaching(r, sign, kLeastFloat);
  if (!(all.sum >= need)) return {0.0, 0.0, 0.0};
  PlaneCut search(need, all);
  while (search.searching()) search.add(reaching(r, sign, search.probe()));
  PlaneSteepest steepest = {search.cut(), search.tied_move(), 1.0};
  double tied = 0.0;
  for_own_elements(r, sign,
                   [&](int64_t, double, double fall, double room) { tied += plane_tied(steepest, fall, room); });
  tied = block_sum(tied);
  if (steepest.together < tied) steepest.share = steepest.together / tied;
  return steepest;
}

// Writes the elements as far as move(fall, room) takes them; their distance.
template <Norm kNorm, class Move>
__device__ double write_moved(const PlaneRow& r, double sign, const Move& move) {
  double own = 0.0;
  for_own_elements(r, sign, [&](int64_t i, double place, double fall, double room) {
    const auto moved = static_cast<float>(plane_moved(place, fall, move(fall, room)));
    const float out = clamped(moved, r.low, r.high);
    const double length = plane_length<kNorm>(place, out);
    own = kNorm == Norm::linf ? larger_of(own, length) : own + length;
    r.out[i] = out;
  });
  if (kNorm == Norm::linf) return block_max(own);
  return kNorm == Norm::l2 ? sqrt(block_sum(own)) : block_sum(own);
}

template <Norm kNorm>
__device__ double project_row(const PlaneRow& r, double value) {
  if (value == 0.0 || !(fabs(value) < __builtin_huge_val())) {
    const float bad = value == 0.0 ? 0.0f : __builtin_nanf("");
    for_own(r.elements, [&](int64_t i) { r.out[i] = clamped(r.x[i], r.low, r.high) + bad; });
    return bad;
  }
  const double sign = value > 0.0 ? 1.0 : -1.0, need = fabs(value);
  if constexpr (kNorm == Norm::l1) {
    const PlaneSteepest steepest = steepest_of(r, sign, need);
    return write_moved<kNorm>(r, sign,
                              [&](double fall, double room) { return plane_steepest_move(steepest, fall, room); });
  } else {
    PlaneRoot search(need);
    while (search.searching()) add_sums<kNorm>(r, sign, search);
    const double t = search.t();
    return write_moved<kNorm>(r, sign,
                              [&](double fall, double room) { return lesser_of(plane_reach<kNorm>(t, fall), room); });
  }
}

template <Norm kNorm>
__global__ void __launch_bounds__(1024) project_plane_kernel(const ProjectPlane a, bool on_chip) {
  extern __shared__ float chip[];
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    PlaneRow r = plane_row(a, sample);
    double value = sum_of(r.elements,
                          [&](int64_t i) { return plane_value(r.x[i], r.w[i], r.at ? r.at[i] : 0.0f, r.low, r.high); });
    value += a.b[sample % a.planes];
    if (on_chip) {  // each thread comes back to its own elements only
      for_own(r.elements, [&](int64_t i) {
        chip[i] = r.x[i];
        chip[r.elements + i] = r.w[i];
      });
      r.x = chip;
      r.w = chip + r.elements;
    }
    const double distance = project_row<kNorm>(r, value);
    if (threadIdx.x == 0) a.distance[sample] = static_cast<float>(distance);
  }
}

template <Norm kNorm>
void launch_rows(const ProjectPlane& a, cudaStream_t stream) {
  project_plane_kernel<kNorm>
      <<<row_blocks(a.samples), row_threads(a.elements), row_memory(a.elements), stream>>>(a, fits_on_chip(a.elements));
}

}  // namespace

int project_plane(const ProjectPlane& a, Launch launch) {
  if (a.samples == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  if (a.norm == Norm::linf)
    launch_rows<Norm::linf>(a, stream_of(launch));
  else if (a.norm == Norm::l2)
    launch_rows<Norm::l2>(a, stream_of(launch));
  else
    launch_rows<Norm::l1>(a, stream_of(launch));
  return cudaGetLastError();
}

}  // namespace afd::cuda
