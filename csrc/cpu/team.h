// Threads for the CPU kernels: those of the OpenMP runtime that the process (torch) has already loaded.
//
// Linking an OpenMP runtime of our own would put two in one process: two pools of threads, each spinning while the
// other works. So the module links none, and finds the loaded one by name when it first needs it. GNU, LLVM and Intel
// runtimes all export this entry point.
#pragma once

#include <cstdint>

namespace afd::cpu {

// Calls work(data, thread, threads) on each thread of a team of at most `wanted`.
void run_team(int wanted, void (*work)(void*, int, int), void* data);

// True if a runtime was found; without one, kernels run on the calling thread (`afd info` says so).
bool has_team();

// Splits [0, count) into one contiguous range a thread, none shorter than `grain` while another thread would still
// help.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t grain, const Body& body) {
  const int64_t useful = (count + grain - 1) / grain;
  const int wanted = useful < threads ? static_cast<int>(useful) : threads;
  if (wanted <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  struct Job {
    const Body& body;
    int64_t count;
  } job{body, count};
  run_team(
      wanted,
      [](void* data, int thread, int team) {
        const Job& job = *static_cast<Job*>(data);
        const int64_t begin = job.count * thread / team, end = job.count * (thread + 1) / team;
        if (begin < end) job.body(begin, end);
      },
      &job);
}

}  // namespace afd::cpu
