// The instruction sets that the module holds: each CPU kernel exists once for each, in a namespace of that name.
#pragma once

#include <vector>

#include "afd/common.h"

namespace afd::cpu {

std::vector<Isa> compiled_isas();  // ascending
bool runs_here(Isa isa);           // asked of the CPU, not of the build machine
const char* name_of(Isa isa);
bool multiplies_bf16();  // in hardware: AVX512-BF16 or AMX

}  // namespace afd::cpu

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

// Behind the kernel, in its file: the op itself, which forwards to the instruction set asked for. It stands in the
// baseline's compilation alone, so it runs anywhere.
#ifdef AFD_FORWARDS
#define AFD_CPU_KERNEL(op, Args)                                                    \
  namespace afd::cpu {                                                              \
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
  }                                                                                 \
  }
#else
#define AFD_CPU_KERNEL(op, Args)
#endif
