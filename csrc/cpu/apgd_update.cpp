// Auto-PGD's bookkeeping on the CPU: a few dozen bytes a sample to decide, then whole rows, copied only where the
// decision asks for it: 8 bytes an element for each row that moves. A thread takes a range of samples and finishes each
// before the next, so that a row that serves two copies is read once from memory.

#include "afd/apgd_update.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements

void copy_row(void* to, const void* from, int64_t row, int64_t bytes) {
  std::memcpy(static_cast<char*>(to) + row * bytes, static_cast<const char*>(from) + row * bytes,
              static_cast<size_t>(bytes));
}

void move_rows(const ApgdUpdate& a, int64_t row, uint8_t moves) {
  const int64_t x_bytes = a.elements * static_cast<int64_t>(sizeof(float)), grad_bytes = a.elements * a.grad_bytes;
  if (moves & kApgdFooled) copy_row(a.x_best_adv, a.x_adv, row, x_bytes);
  if (moves & kApgdImproved) {
    copy_row(a.x_best, a.x_adv, row, x_bytes);
    copy_row(a.grad_best, a.grad, row, grad_bytes);
  }
  if (apgd_goes_back(moves)) {
    copy_row(a.x_adv, a.x_best, row, x_bytes);
    copy_row(a.grad, a.grad_best, row, grad_bytes);
  }
}

}  // namespace

void apgd_update(const ApgdUpdate& a, int threads) {
  const int64_t grain = a.elements < kGrain ? kGrain / (a.elements + 1) + 1 : 1;
  parallel_for(threads, a.samples, grain, [&a](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t moves = apgd_decide(a, i);
      if (a.elements > 0) move_rows(a, i, moves);
    }
  });
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(apgd_update, ApgdUpdate)
