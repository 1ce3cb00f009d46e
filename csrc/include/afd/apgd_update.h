// The bookkeeping of Auto-PGD (Croce & Hein 2020, Algorithm 1) after the loss and gradient at x_adv are known. Per
// sample: keep the best point, its gradient and loss; keep the last point that fooled the model; count how often the
// loss rose. At a checkpoint, halve the step and go back to the best point where
//   - the loss rose at most rho * interval times since the last checkpoint (it oscillates), or
//   - the step was not halved there and the best loss has not improved since (it is stuck).
//
// apgd_decide settles everything about one sample but its rows, and says in `moves` which rows must be copied.
#pragma once

#include "afd/common.h"

namespace afd {

enum ApgdMove : uint8_t { kApgdImproved = 1, kApgdFooled = 2, kApgdHalved = 4 };

struct ApgdUpdate {
  float* x_adv;           // [samples, elements]; goes back to x_best where the step is halved
  void* grad;             // same, of grad_bytes an element; goes back to grad_best likewise
  const float* loss;      // [samples], at x_adv
  const uint8_t* fooled;  // [samples], 1 where x_adv fools the model
  float* x_best;          // like x_adv
  void* grad_best;        // like grad
  float* x_best_adv;      // like x_adv
  float* loss_best;       // [samples], as are all below
  float* loss_last;       // the loss one iteration ago
  float* loss_at_check;   // loss_best at the last checkpoint
  float* step;
  int32_t* increases;  // how often the loss rose since the last checkpoint
  uint8_t* reduced;    // 1 where the step was halved at the last checkpoint
  uint8_t* broken;     // 1 where the model was fooled at least once
  uint8_t* moves;      // out: the sum of the ApgdMoves made
  int grad_bytes;
  int64_t samples, elements;
  bool checkpoint;
  int most_increases;  // rho * interval, rounded down
};

AFD_HOST_DEVICE uint8_t apgd_decide(const ApgdUpdate& a, int64_t i) {
  const float loss = a.loss[i];
  uint8_t moves = 0;
  if (loss > a.loss_best[i]) {
    a.loss_best[i] = loss;
    moves |= kApgdImproved;
  }
  if (a.fooled[i]) {
    a.broken[i] = 1;
    moves |= kApgdFooled;
  }
  const int increases = a.increases[i] + (loss > a.loss_last[i]);
  a.loss_last[i] = loss;
  a.increases[i] = a.checkpoint ? 0 : increases;
  if (a.checkpoint) {
    const bool stuck = !a.reduced[i] && a.loss_at_check[i] >= a.loss_best[i];
    const bool halve = increases <= a.most_increases || stuck;
    if (halve) {
      a.step[i] *= 0.5f;
      moves |= kApgdHalved;
    }
    a.reduced[i] = halve;
    a.loss_at_check[i] = a.loss_best[i];
  }
  a.moves[i] = moves;
  return moves;
}

// Going back to the best point is no move where x_adv has just become it.
AFD_HOST_DEVICE bool apgd_goes_back(uint8_t moves) { return (moves & (kApgdHalved | kApgdImproved)) == kApgdHalved; }

namespace cpu {
void apgd_update(const ApgdUpdate& args, Launch launch);
}
namespace cuda {
int apgd_update(const ApgdUpdate& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
