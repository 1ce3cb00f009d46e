// The CUDA runtime that is linked into the module.
#pragma once

namespace afd::cuda {

int runtime_version();                 // e.g. 13000
const char* error_string(int status);  // of a cudaError_t

}  // namespace afd::cuda
