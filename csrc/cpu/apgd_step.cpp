// Auto-PGD's momentum step on the CPU. It reads x_adv, x_adv_old, x and grad and writes x_adv and x_adv_old: 24 bytes
// an element with float32 gradients, which is its floor. Threads walk contiguous ranges of the batch, sample by sample,
// so that step and eps are constants of the vectorised inner loop. Compiled once per instruction set (AFD_ISA).

#include "afd/apgd_step.h"

#include "cpu/dispatch.h"
#include "cpu/team.h"

namespace afd::cpu::AFD_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which waking another thread costs more than it saves

template <class Grad>
void step_range(const ApgdStep& args, int64_t begin, int64_t end, float step, float eps) {
  float* x_adv = args.x_adv;
  float* x_adv_old = args.x_adv_old;
  const float* x = args.x;
  const auto* grad = static_cast<const typename Grad::type*>(args.grad);
  const float a = args.a, rest = args.rest, low = args.low, high = args.high;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float now = x_adv[i];
    x_adv[i] = apgd_step_element(now, x_adv_old[i], x[i], Grad::sign(grad[i]), step, eps, a, rest, low, high);
    x_adv_old[i] = now;
  }
}

template <class Grad>
void step_batch(const ApgdStep& args, int threads) {
  parallel_for(threads, args.samples * args.elements, kGrain, [&args](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / args.elements;
      const int64_t sample_end = (sample + 1) * args.elements;
      const int64_t stop = sample_end < end ? sample_end : end;
      step_range<Grad>(args, begin, stop, at(args.step, sample), at(args.eps, sample));
      begin = stop;
    }
  });
}

}  // namespace

void apgd_step(const ApgdStep& args, int threads) {
  switch (args.grad_dtype) {
    case DType::f32:
      return step_batch<GradF32>(args, threads);
    case DType::f16:
      return step_batch<GradF16>(args, threads);
    case DType::bf16:
      return step_batch<GradBF16>(args, threads);
  }
}

}  // namespace afd::cpu::AFD_ISA

AFD_CPU_KERNEL(apgd_step, ApgdStep)
