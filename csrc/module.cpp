// SPDX-License-Identifier: Apache-2.0
// What is not a tensor operator: build information and the choice of the CPU instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" bool vosops_set_cpu_isa(const char* name);
extern "C" const char* vosops_cpu_isa();
extern "C" const char* vosops_usable_isa(int index);

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; const char* name = vosops_usable_isa(i); ++i) names.emplace_back(name);
  return names;
}

void set_cpu_isa(const std::string& name) {
  if (vosops_set_cpu_isa(name.c_str())) return;
  std::string usable;
  for (const std::string& isa : cpu_isas()) usable += (usable.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("cpu isa must be one of " + usable + " on this CPU, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU instruction sets of vosops";
  m.def("cpu_isa", [] { return std::string(vosops_cpu_isa()); }, "The instruction set in use");
  m.def("cpu_isas", &cpu_isas, "The instruction sets this CPU can run, best first");
  m.def("set_cpu_isa", &set_cpu_isa, pybind11::arg("name"), "Use one instruction set from now on");
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", VOSOPS_COMPILER}, {"torch", VOSOPS_TORCH_VERSION}, {"cuda architectures", "none"}};
      },
      "Compiler, the torch version built against, compiled GPU architectures");
}
