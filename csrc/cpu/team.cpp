#include "cpu/team.h"

#include <dlfcn.h>

namespace afd::cpu {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
};

template <class Function>
Function loaded(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const OpenMP& runtime() {
  static const OpenMP found{loaded<decltype(OpenMP::parallel)>("GOMP_parallel"),
                            loaded<decltype(OpenMP::thread_num)>("omp_get_thread_num"),
                            loaded<decltype(OpenMP::num_threads)>("omp_get_num_threads")};
  return found;
}

struct Call {
  void (*work)(void*, int, int);
  void* data;
};

void on_each_thread(void* argument) {
  const Call& call = *static_cast<Call*>(argument);
  call.work(call.data, runtime().thread_num(), runtime().num_threads());
}

}  // namespace

bool has_team() { return runtime().parallel && runtime().thread_num && runtime().num_threads; }

void run_team(int wanted, void (*work)(void*, int, int), void* data) {
  if (wanted <= 1 || !has_team()) return work(data, 0, 1);
  Call call{work, data};
  runtime().parallel(on_each_thread, &call, static_cast<unsigned>(wanted), 0);
}

}  // namespace afd::cpu
