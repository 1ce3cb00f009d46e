// The Python face of the core: addresses and sizes in, a status out. afd/ops/native.py is the only caller and has
// checked every argument; nothing here looks at a tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "afd/pgd_step.h"
#include "afd/project.h"
#include "afd/random_start.h"
#include "afd/runtime.h"
#include "cpu/dispatch.h"
#include "cpu/team.h"

namespace py = pybind11;
using Address = std::uintptr_t;  // 0 is null

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

afd::PerSample setting(float value, Address values) { return {pointer<const float>(values), value}; }

afd::cpu::Launch on_cpu(int isa, int threads) { return {static_cast<afd::Isa>(isa), threads}; }

afd::PgdStep pgd_step_args(Address x_adv, Address x, Address grad, Address out, int grad_dtype, int64_t samples,
                           int64_t elements, float alpha, Address alphas, float eps, Address epsilons, float low,
                           float high, int norm, double sparsity, Address sparsities, Address workspace) {
  return {pointer<const float>(x_adv),
          pointer<const float>(x),
          pointer<const void>(grad),
          pointer<float>(out),
          static_cast<afd::DType>(grad_dtype),
          samples,
          elements,
          setting(alpha, alphas),
          setting(eps, epsilons),
          low,
          high,
          static_cast<afd::Norm>(norm),
          {pointer<const float>(sparsities), sparsity},
          pointer<double>(workspace)};
}

afd::Project project_args(Address x_adv, Address x, Address out, int64_t samples, int64_t elements, float eps,
                          Address epsilons, float low, float high, int norm, Address workspace) {
  return {pointer<const float>(x_adv),
          pointer<const float>(x),
          pointer<float>(out),
          samples,
          elements,
          setting(eps, epsilons),
          low,
          high,
          static_cast<afd::Norm>(norm),
          pointer<double>(workspace)};
}

afd::RandomStart random_start_args(Address x, Address out, int64_t samples, int64_t elements, float eps,
                                   Address epsilons, float low, float high, int norm, uint64_t seed,
                                   uint64_t first_sample) {
  return {pointer<const float>(x),
          pointer<float>(out),
          samples,
          elements,
          setting(eps, epsilons),
          low,
          high,
          static_cast<afd::Norm>(norm),
          seed,
          first_sample};
}

// Binds op as op(*arguments of `build`, *two launch numbers), with the GIL released while it runs.
template <class Result, class Args, class Launch, class... In>
void bind(py::module_& module, const char* name, Args (*build)(In...), Result (*op)(const Args&, Launch),
          Launch (*place)(int, Address)) {
  module.def(
      name, [=](In... in, int where, Address how) { return op(build(in...), place(where, how)); },
      py::call_guard<py::gil_scoped_release>());
}

std::vector<std::string> names(const std::vector<afd::Isa>& isas) {
  std::vector<std::string> result;
  for (afd::Isa isa : isas) result.emplace_back(afd::cpu::name_of(isa));
  return result;
}

std::vector<std::string> isas_that_run() {
  std::vector<afd::Isa> usable;
  for (afd::Isa isa : afd::cpu::compiled_isas())
    if (afd::cpu::runs_here(isa)) usable.push_back(isa);
  return names(usable);
}

void bind_cpu(py::module_ cpu) {
  const auto place = +[](int isa, Address threads) { return on_cpu(isa, static_cast<int>(threads)); };
  bind(cpu, "pgd_step", pgd_step_args, afd::cpu::pgd_step, place);
  bind(cpu, "project", project_args, afd::cpu::project, place);
  bind(cpu, "random_start", random_start_args, afd::cpu::random_start, place);
  cpu.def("compiled_isas", [] { return names(afd::cpu::compiled_isas()); });
  cpu.def("usable_isas", isas_that_run);
  cpu.def("has_team", afd::cpu::has_team);
}

#ifdef AFD_WITH_CUDA
void bind_cuda(py::module_ cuda) {
  const auto place = +[](int device, Address stream) { return afd::cuda::Launch{device, pointer<void>(stream)}; };
  bind(cuda, "pgd_step", pgd_step_args, afd::cuda::pgd_step, place);
  bind(cuda, "project", project_args, afd::cuda::project, place);
  bind(cuda, "random_start", random_start_args, afd::cuda::random_start, place);
  cuda.def("l2_workspace", afd::cuda::l2_workspace);
  cuda.def("error_string", afd::cuda::error_string);
  cuda.attr("runtime_version") = afd::cuda::runtime_version();
  cuda.attr("architectures") = AFD_CUDA_ARCHITECTURES;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "afd's compiled kernels; call them through afd.ops";
  module.attr("compiler") = __VERSION__;
  bind_cpu(module.def_submodule("cpu"));
#ifdef AFD_WITH_CUDA
  bind_cuda(module.def_submodule("cuda"));
#endif
}
