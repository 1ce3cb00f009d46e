// Each CPU kernel exists once per instruction set, in a namespace of that name; these functions forward to the one
// asked for. This file is compiled for the baseline, so it runs anywhere.

#include "cpu/dispatch.h"

#include "afd/apgd_step.h"
#include "afd/apgd_update.h"
#include "afd/load_batch.h"
#include "afd/pgd_step.h"
#include "afd/project.h"
#include "afd/projection_logits.h"
#include "afd/random_start.h"
#include "afd/spectral_linear.h"
#include "afd/spectral_norm.h"

#ifdef AFD_HAVE_AVX2
#define AFD_WHERE_AVX2(...) __VA_ARGS__
#else
#define AFD_WHERE_AVX2(...)
#endif
#ifdef AFD_HAVE_AVX512
#define AFD_WHERE_AVX512(...) __VA_ARGS__
#else
#define AFD_WHERE_AVX512(...)
#endif

#define AFD_FORWARD(op, Args)                                                       \
  namespace baseline {                                                              \
  void op(const Args&, int);                                                        \
  }                                                                                 \
  AFD_WHERE_AVX2(namespace avx2 { void op(const Args&, int); })                     \
  AFD_WHERE_AVX512(namespace avx512 { void op(const Args&, int); })                 \
  void op(const Args& args, Launch launch) {                                        \
    switch (launch.isa) {                                                           \
      AFD_WHERE_AVX512(case Isa::avx512 : return avx512::op(args, launch.threads);) \
      AFD_WHERE_AVX2(case Isa::avx2 : return avx2::op(args, launch.threads);)       \
      default:                                                                      \
        return baseline::op(args, launch.threads);                                  \
    }                                                                               \
  }

namespace afd::cpu {

AFD_FORWARD(pgd_step, PgdStep)
AFD_FORWARD(project, Project)
AFD_FORWARD(random_start, RandomStart)
AFD_FORWARD(apgd_step, ApgdStep)
AFD_FORWARD(apgd_update, ApgdUpdate)
AFD_FORWARD(load_batch, LoadBatch)
AFD_FORWARD(spectral_norm, SpectralNorm)
AFD_FORWARD(spectral_linear, SpectralLinear)
AFD_FORWARD(spectral_linear_backward, SpectralLinearBackward)
AFD_FORWARD(projection_logits, ProjectionLogits)
AFD_FORWARD(projection_logits_backward, ProjectionLogitsBackward)

std::vector<Isa> compiled_isas() { return {Isa::baseline, AFD_WHERE_AVX2(Isa::avx2, ) AFD_WHERE_AVX512(Isa::avx512)}; }

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      return "baseline";
  }
  return "unknown";
}

}  // namespace afd::cpu
