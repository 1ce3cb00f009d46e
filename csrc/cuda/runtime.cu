#include "afd/runtime.h"

#include <cuda_runtime.h>

namespace afd::cuda {

int runtime_version() { return CUDART_VERSION; }

const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace afd::cuda
