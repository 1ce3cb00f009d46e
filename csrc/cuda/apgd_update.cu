// Auto-PGD's bookkeeping on the GPU, in two launches: one thread a sample decides and leaves its moves in memory; then
// threads go over all rows, four elements at a time where alignment allows, and copy where the moves say so. The split
// keeps the decision in one place: a single launch would have blocks read state that another has begun to change. Rows
// that do not move cost one byte, read through the cache, and no copy.

#include "afd/apgd_update.h"

#include "cuda/launch.cuh"

namespace afd::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) apgd_decide_kernel(const ApgdUpdate a) {
  for (int64_t i = first_item(); i < a.samples; i += item_stride()) apgd_decide(a, i);
}

// GradWord only carries bits: an unsigned integer of the gradient's size.
template <class GradWord, int kWidth>
__global__ void __launch_bounds__(kThreads) apgd_move_kernel(const ApgdUpdate a) {
  using Floats = Pack<float, kWidth>;
  using Grads = Pack<GradWord, kWidth>;
  auto* x_adv = reinterpret_cast<Floats*>(a.x_adv);
  auto* x_best = reinterpret_cast<Floats*>(a.x_best);
  auto* x_best_adv = reinterpret_cast<Floats*>(a.x_best_adv);
  auto* grad = static_cast<Grads*>(a.grad);
  auto* grad_best = static_cast<Grads*>(a.grad_best);
  const int64_t pack = own_pack(), per_sample = a.elements / kWidth;
  if (pack >= per_sample) return;
#pragma unroll 1  // rarely more than one
  for (int64_t sample = first_row(); sample < a.samples; sample += row_stride()) {
    const int64_t p = sample * per_sample + pack;
    const uint8_t moves = a.moves[sample];
    if (moves & (kApgdFooled | kApgdImproved)) {
      const Floats now = x_adv[p];
      if (moves & kApgdFooled) x_best_adv[p] = now;
      if (moves & kApgdImproved) {
        x_best[p] = now;
        grad_best[p] = grad[p];
      }
    }
    if (apgd_goes_back(moves)) {
      x_adv[p] = x_best[p];
      grad[p] = grad_best[p];
    }
  }
}

template <class GradWord, int kWidth>
void launch_width(const ApgdUpdate& a, cudaStream_t stream) {
  const Grid grid = grid_of(a.elements / kWidth, a.samples);
  apgd_move_kernel<GradWord, kWidth><<<blocks_of(grid), threads_of(grid), 0, stream>>>(a);
}

template <class GradWord>
void launch_moves(const ApgdUpdate& a, cudaStream_t stream) {
  const bool wide = sizeof(GradWord) <= 4 && a.elements % 4 == 0 && aligned16(a.x_adv) && aligned16(a.x_best) &&
                    aligned16(a.x_best_adv) && aligned16(a.grad) && aligned16(a.grad_best);
  if (wide)
    launch_width<GradWord, sizeof(GradWord) <= 4 ? 4 : 1>(a, stream);
  else
    launch_width<GradWord, 1>(a, stream);
}

}  // namespace

int apgd_update(const ApgdUpdate& a, Launch launch) {
  if (a.samples == 0) return cudaSuccess;
  if (const cudaError_t error = enter(launch)) return error;
  const cudaStream_t stream = stream_of(launch);
  apgd_decide_kernel<<<blocks_for(a.samples), kThreads, 0, stream>>>(a);
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (a.elements == 0) return cudaSuccess;
  switch (a.grad_bytes) {
    case 2:
      launch_moves<uint16_t>(a, stream);
      break;
    case 4:
      launch_moves<uint32_t>(a, stream);
      break;
    case 8:
      launch_moves<uint64_t>(a, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace afd::cuda
