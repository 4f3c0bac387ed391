// SPDX-License-Identifier: Apache-2.0
// The instruction set in use, chosen at run time.
#pragma once
#include <vector>

#include "kernels.h"

namespace vosops {

// Kernels of every instruction set this CPU can run, best first; never empty.
const std::vector<const Kernels*>& usable_kernels();

// The ones in use: the best, or what VOSOPS_CPU_ISA or set_cpu_isa() asked for.
const Kernels& kernels();

}  // namespace vosops

// For module.cpp, which is a library of its own. Returns false for a name this CPU cannot run.
extern "C" __attribute__((visibility("default"))) bool vosops_set_cpu_isa(const char* name);
extern "C" __attribute__((visibility("default"))) const char* vosops_cpu_isa();
extern "C" __attribute__((visibility("default"))) const char* vosops_usable_isa(
    int index);  // null past the last
