// Which instruction sets the module holds and which of them this CPU can run.
#pragma once

#include <vector>

#include "afd/common.h"

namespace afd::cpu {

std::vector<Isa> compiled_isas();  // ascending
bool runs_here(Isa isa);           // asked of the CPU, not of the build machine
const char* name_of(Isa isa);
bool multiplies_bf16();  // in hardware: AVX512-BF16 or AMX

}  // namespace afd::cpu
