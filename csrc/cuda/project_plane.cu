// The nearest point of a plane within the box, on the GPU: one block a sample. Where it fits, x and w are read once
// into shared memory and the passes of a search (project_plane.h) run there; a larger sample is walked in place by one
// large block, mostly in the L2 cache. Each thread gets every sum and steers the search by itself: nothing returns to
// the host, and one launch serves points and distances.

#include "afd/project_plane.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace afd::cuda {
namespace {

// Writes the moved elements; the distance.
template <Norm kNorm, class Move>
__device__ double write_moved(const PlaneRow& r, bool above, const Move& move) {
  double own = 0.0;
  for_own(r.elements, [&](int64_t i) {
    const float x = r.x[i], out = plane_moved(x, r.w[i], above, move(i), r.low, r.high);
    const double length = plane_length<kNorm>(out, x, r.low, r.high);
    own = kNorm != Norm::linf ? own + length : own > length ? own : length;
    r.out[i] = out;
  });
  if (kNorm == Norm::linf) return block_max(own);
  return kNorm == Norm::l2 ? sqrt(block_sum(own)) : block_sum(own);
}

template <Norm kNorm>
__device__ double move_evenly(const PlaneRow& r, bool above, double need) {
  PlaneRoot search(need);
  while (search.searching()) {
    const double t = search.t();
    double sum = 0.0, slope = 0.0;
    for_own(r.elements, [&](int64_t i) {
      const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
      const double reach = plane_reach<kNorm>(t, e.size);
      sum += e.size * plane_move(reach, e.room);
      slope += plane_slope<kNorm>(e, reach);
    });
    search.add(block_sum(sum), block_sum(slope));
  }
  const double t = search.t();
  return write_moved<kNorm>(r, above, [&](int64_t i) {
    const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
    return plane_move(plane_reach<kNorm>(t, e.size), e.room);
  });
}

struct CutSums {
  double sum;
  int32_t least, below;  // key
};

__device__ inline CutSums sums_reaching(const PlaneRow& r, bool above, int32_t probe) {
  double sum = 0.0;
  int32_t least = 0x7fffffff, below = 0;
  for_own(r.elements, [&](int64_t i) {
    const int32_t key = plane_key(r.w[i]);
    if (key < probe) {
      below = max(below, key);
    } else {
      const PlaneElement e = plane_element(r.x[i], r.w[i], above, r.low, r.high);
      sum += e.size * e.room;
      least = min(least, key);
    }
  });
  return {block_sum(sum), -block_max(-least), block_max(below)};
}

__device__ inline double move_steepest(const PlaneRow& r, bool above, double need) {
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
    const double tied = sum_of(r.elements, [&](int64_t i) {
      const double room = plane_element(r.x[i], r.w[i], above, r.low, r.high).room;
      return plane_key(r.w[i]) == cut ? plane_tied(room, together) : 0.0;
    });
    share = together < tied ? together / tied : 1.0;
  }
  return write_moved<Norm::l1>(r, above, [&](int64_t i) {
    const double room = plane_element(r.x[i], r.w[i], above, r.low, r.high).room;
    return plane_l1_move(plane_key(r.w[i]), cut, room, together, share);
  });
}

template <Norm kNorm>
__device__ double project_row(const PlaneRow& r, double value) {
  if (value == 0.0 || !(fabs(value) < __builtin_huge_val())) {
    const float bad = value == 0.0 ? 0.0f : __builtin_nanf("");
    for_own(r.elements, [&](int64_t i) { r.out[i] = clamped(r.x[i], r.low, r.high) + bad; });
    return bad;
  }
  if (kNorm == Norm::l1) return move_steepest(r, value > 0.0, fabs(value));
  return move_evenly<kNorm == Norm::l2 ? Norm::l2 : Norm::linf>(r, value > 0.0, fabs(value));
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
