// The Python face of the core: addresses and sizes in, a status out. afd/ops/native.py is the only caller and has
// checked every argument; nothing here looks at a tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "afd/apgd_step.h"
#include "afd/apgd_update.h"
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

afd::ApgdStep apgd_step_args(Address x_adv, Address x_adv_old, Address x, Address grad, int grad_dtype, int64_t samples,
                             int64_t elements, float step, Address steps, float eps, Address epsilons, float a,
                             float rest, float low, float high) {
  return {pointer<float>(x_adv),
          pointer<float>(x_adv_old),
          pointer<const float>(x),
          pointer<const void>(grad),
          static_cast<afd::DType>(grad_dtype),
          samples,
          elements,
          setting(step, steps),
          setting(eps, epsilons),
          a,
          rest,
          low,
          high};
}

afd::ApgdUpdate apgd_update_args(Address x_adv, Address grad, Address loss, Address fooled, Address x_best,
                                 Address grad_best, Address x_best_adv, Address loss_best, Address loss_last,
                                 Address loss_at_check, Address step, Address increases, Address reduced,
                                 Address broken, Address moves, int grad_bytes, int64_t samples, int64_t elements,
                                 bool checkpoint, int most_increases) {
  return {pointer<float>(x_adv),
          pointer<void>(grad),
          pointer<const float>(loss),
          pointer<const uint8_t>(fooled),
          pointer<float>(x_best),
          pointer<void>(grad_best),
          pointer<float>(x_best_adv),
          pointer<float>(loss_best),
          pointer<float>(loss_last),
          pointer<float>(loss_at_check),
          pointer<float>(step),
          pointer<int32_t>(increases),
          pointer<uint8_t>(reduced),
          pointer<uint8_t>(broken),
          pointer<uint8_t>(moves),
          grad_bytes,
          samples,
          elements,
          checkpoint,
          most_increases};
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
  bind(cpu, "apgd_step", apgd_step_args, afd::cpu::apgd_step, place);
  bind(cpu, "apgd_update", apgd_update_args, afd::cpu::apgd_update, place);
  cpu.def("compiled_isas", [] { return names(afd::cpu::compiled_isas()); });
  cpu.def("usable_isas", isas_that_run);
  cpu.def("has_team", afd::cpu::has_team);
  cpu.def("multiplies_bf16", afd::cpu::multiplies_bf16);
}

#ifdef AFD_WITH_CUDA
void bind_cuda(py::module_ cuda) {
  const auto place = +[](int device, Address stream) { return afd::cuda::Launch{device, pointer<void>(stream)}; };
  bind(cuda, "pgd_step", pgd_step_args, afd::cuda::pgd_step, place);
  bind(cuda, "project", project_args, afd::cuda::project, place);
  bind(cuda, "random_start", random_start_args, afd::cuda::random_start, place);
  bind(cuda, "apgd_step", apgd_step_args, afd::cuda::apgd_step, place);
  bind(cuda, "apgd_update", apgd_update_args, afd::cuda::apgd_update, place);
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
