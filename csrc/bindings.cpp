// The Python face of the core: addresses and sizes in, a status out. afd/ops/native.py is the only caller and has
// checked every argument; nothing here looks at a tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "afd/apgd_step.h"
#include "afd/apgd_update.h"
#include "afd/load_batch.h"
#include "afd/pgd_step.h"
#include "afd/project.h"
#include "afd/project_plane.h"
#include "afd/projection_logits.h"
#include "afd/random_start.h"
#include "afd/runtime.h"
#include "afd/spectral_linear.h"
#include "afd/spectral_norm.h"
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

afd::ProjectPlane project_plane_args(Address x, Address w, Address b, Address at, Address out, Address distance,
                                     int64_t samples, int64_t planes, int64_t elements, float low, float high,
                                     int norm) {
  return {pointer<const float>(x),
          pointer<const float>(w),
          pointer<const float>(b),
          pointer<const float>(at),
          pointer<float>(out),
          pointer<float>(distance),
          samples,
          planes,
          elements,
          low,
          high,
          static_cast<afd::Norm>(norm)};
}

afd::RandomStart random_start_args(Address x, Address out, int64_t samples, int64_t elements, float eps,
                                   Address epsilons, float low, float high, int norm, uint64_t seed, Address seeds,
                                   uint64_t first_sample) {
  return {pointer<const float>(x),
          pointer<float>(out),
          samples,
          elements,
          setting(eps, epsilons),
          low,
          high,
          static_cast<afd::Norm>(norm),
          {pointer<const int64_t>(seeds), seed},
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

afd::LoadBatch load_batch_args(Address pixels, Address index, Address draws, Address out, int64_t images,
                               int64_t samples, int64_t channels, int64_t height, int64_t width, float scale,
                               int64_t padding, bool flip, bool channels_last) {
  return {pointer<const uint8_t>(pixels),
          pointer<const int64_t>(index),
          pointer<const int64_t>(draws),
          pointer<float>(out),
          images,
          samples,
          channels,
          height,
          width,
          scale,
          padding,
          flip,
          channels_last};
}

afd::SpectralLinear spectral_linear_args(Address out, Address bias, Address sigma, int64_t samples, int64_t rows,
                                         float slope) {
  return {pointer<float>(out), pointer<const float>(bias), pointer<const float>(sigma), samples, rows, slope};
}

afd::SpectralLinearBackward spectral_linear_backward_args(Address grad, Address out, Address bias, Address sigma,
                                                          Address u, Address scaled, Address bias_grad,
                                                          Address u_scaled, Address workspace, int64_t samples,
                                                          int64_t rows, float slope) {
  return {pointer<const float>(grad),
          pointer<const float>(out),
          pointer<const float>(bias),
          pointer<const float>(sigma),
          pointer<const float>(u),
          pointer<float>(scaled),
          pointer<float>(bias_grad),
          pointer<float>(u_scaled),
          pointer<float>(workspace),
          samples,
          rows,
          slope};
}

afd::ProjectionLogits projection_logits_args(Address h, Address w, Address bias, Address sigma_w, Address y, Address e,
                                             Address sigma_e, Address score, int64_t samples, int64_t width,
                                             int64_t classes) {
  return {pointer<const float>(h),
          pointer<const float>(w),
          pointer<const float>(bias),
          pointer<const float>(sigma_w),
          pointer<const int64_t>(y),
          pointer<const float>(e),
          pointer<const float>(sigma_e),
          pointer<float>(score),
          samples,
          width,
          classes};
}

afd::Normalised normalised(Address weight, Address sigma, Address u, Address v) {
  return {pointer<const float>(weight), pointer<const float>(sigma), pointer<const float>(u), pointer<const float>(v)};
}

afd::ProjectionLogitsBackward projection_logits_backward_args(Address grad, Address h, Address w, Address sigma_w,
                                                              Address u_w, Address v_w, Address y, Address e,
                                                              Address sigma_e, Address u_e, Address v_e, Address dh,
                                                              Address dw, Address db, Address de, Address workspace,
                                                              int64_t samples, int64_t width, int64_t classes) {
  return {pointer<const float>(grad),
          pointer<const float>(h),
          normalised(w, sigma_w, u_w, v_w),
          pointer<const int64_t>(y),
          normalised(e, sigma_e, u_e, v_e),
          pointer<float>(dh),
          pointer<float>(dw),
          pointer<float>(db),
          pointer<float>(de),
          pointer<double>(workspace),
          samples,
          width,
          classes};
}

// A group of matrices: addresses of weight, u, v, u_out and v_out, then rows and columns.
using Matrices = std::vector<std::array<Address, 7>>;

struct Group {
  std::vector<afd::SpectralMatrix> matrices;
  afd::SpectralNorm args;
};

Group spectral_norm_args(const Matrices& matrices, int n_iter, float eps, bool u_first, Address sigma,
                         Address workspace) {
  Group group;
  for (const auto& [weight, u, v, u_out, v_out, rows, columns] : matrices)
    group.matrices.push_back({pointer<const float>(weight), pointer<const float>(u), pointer<const float>(v),
                              pointer<float>(u_out), pointer<float>(v_out), static_cast<int64_t>(rows),
                              static_cast<int64_t>(columns)});
  group.args = {
      group.matrices.data(),    static_cast<int>(group.matrices.size()), n_iter, eps, u_first, pointer<float>(sigma),
      pointer<float>(workspace)};
  return group;
}

void spectral_norm_on_cpu(const Group& group, afd::cpu::Launch launch) { afd::cpu::spectral_norm(group.args, launch); }

#ifdef AFD_WITH_CUDA
int spectral_norm_on_cuda(const Group& group, afd::cuda::Launch launch) {
  return afd::cuda::spectral_norm(group.args, launch);
}
#endif

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
  bind(cpu, "project_plane", project_plane_args, afd::cpu::project_plane, place);
  bind(cpu, "random_start", random_start_args, afd::cpu::random_start, place);
  bind(cpu, "apgd_step", apgd_step_args, afd::cpu::apgd_step, place);
  bind(cpu, "apgd_update", apgd_update_args, afd::cpu::apgd_update, place);
  bind(cpu, "load_batch", load_batch_args, afd::cpu::load_batch, place);
  bind(cpu, "spectral_linear", spectral_linear_args, afd::cpu::spectral_linear, place);
  bind(cpu, "spectral_linear_backward", spectral_linear_backward_args, afd::cpu::spectral_linear_backward, place);
  bind(cpu, "projection_logits", projection_logits_args, afd::cpu::projection_logits, place);
  bind(cpu, "projection_logits_backward", projection_logits_backward_args, afd::cpu::projection_logits_backward, place);
  bind(cpu, "spectral_norm", spectral_norm_args, spectral_norm_on_cpu, place);
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
  bind(cuda, "project_plane", project_plane_args, afd::cuda::project_plane, place);
  bind(cuda, "random_start", random_start_args, afd::cuda::random_start, place);
  bind(cuda, "apgd_step", apgd_step_args, afd::cuda::apgd_step, place);
  bind(cuda, "apgd_update", apgd_update_args, afd::cuda::apgd_update, place);
  bind(cuda, "load_batch", load_batch_args, afd::cuda::load_batch, place);
  bind(cuda, "spectral_linear", spectral_linear_args, afd::cuda::spectral_linear, place);
  bind(cuda, "spectral_linear_backward", spectral_linear_backward_args, afd::cuda::spectral_linear_backward, place);
  bind(cuda, "projection_logits", projection_logits_args, afd::cuda::projection_logits, place);
  bind(cuda, "projection_logits_backward", projection_logits_backward_args, afd::cuda::projection_logits_backward,
       place);
  bind(cuda, "spectral_norm", spectral_norm_args, spectral_norm_on_cuda, place);
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
  module.def("spectral_norm_workspace",
             [](int64_t rows, int64_t columns) { return afd::spectral_norm_workspace(rows, columns); });
  module.def("spectral_linear_workspace",
             [](int64_t samples, int64_t rows) { return afd::spectral_linear_workspace(samples, rows); });
  module.def("projection_logits_workspace",
             [](int64_t width, int64_t classes) { return afd::projection_logits_workspace(width, classes); });
  bind_cpu(module.def_submodule("cpu"));
#ifdef AFD_WITH_CUDA
  bind_cuda(module.def_submodule("cuda"));
#endif
}
