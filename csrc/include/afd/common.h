// What every kernel shares: where a function may run, the codes that cross the Python boundary, and launch settings.
#pragma once

#include <cstdint>
#include <cstring>

// Static and always inlined: a copy compiled for wide vectors can never be picked by the linker for an older CPU.
#ifdef __CUDACC__
#define AFD_HOST_DEVICE static __host__ __device__ __forceinline__
#define AFD_HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#define AFD_UNROLL_10  // nvcc unrolls loops of constant length by itself
#else
#define AFD_HOST_DEVICE static inline __attribute__((always_inline))
#define AFD_HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#define AFD_UNROLL_10 _Pragma("GCC unroll 10")
#endif

namespace afd {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };  // afd/ops/native.py sends these numbers
enum class Norm : int { linf = 0, l2 = 1, l1 = 2 };     // and these
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// One value for the whole batch, or one for each sample.
struct PerSample {
  const float* values;  // null: `value` serves every sample
  float value;
};

AFD_HOST_DEVICE float at(const PerSample& setting, int64_t sample) {
  return setting.values ? setting.values[sample] : setting.value;
}

AFD_HOST_DEVICE int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

AFD_HOST_DEVICE float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr float kInfinity = __builtin_huge_valf(), kLargestFloat = 3.40282347e+38f;

AFD_HOST_DEVICE bool is_finite(float value) { return value - value == 0.0f; }

// Both give b if either is NaN: with a bound as a and the value as b, a NaN value stays visible.
AFD_HOST_DEVICE float min_of(float a, float b) { return a < b ? a : b; }
AFD_HOST_DEVICE float max_of(float a, float b) { return a > b ? a : b; }

namespace cpu {
struct Launch {
  Isa isa;
  int threads;
};
}  // namespace cpu

namespace cuda {
struct Launch {
  int device;
  void* stream;  // cudaStream_t
};
}  // namespace cuda

}  // namespace afd
