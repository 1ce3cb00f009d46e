// kWidth neighbouring elements, moved by one access where they are together at most 16 bytes.
#pragma once

namespace afd::cuda {

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) PackOf {
  T v[kWidth];
};

}  // namespace afd::cuda
