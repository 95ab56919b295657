// Work for the threads of OpenMP: the pool that torch uses too, where both load the same runtime.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace momkd {

inline int workers_for(int64_t tasks, int threads) {
  return static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(tasks, 1)));
}

// run(task, worker) for each task < tasks, in any order; worker < workers. `run` must not throw.
template <typename Run>
void parallel_for(int64_t tasks, int workers, const Run &run) {
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1)
  for (int64_t task = 0; task < tasks; ++task) {
#ifdef _OPENMP
    run(task, omp_get_thread_num());
#else
    run(task, 0);
#endif
  }
}

// An uninitialised array on a cache-line boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : storage_(new char[static_cast<size_t>(count) * sizeof(T) + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    data_ = reinterpret_cast<T *>(storage_.get() + -address % 64);
  }
  T *get() const { return data_; }
  T &operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<char[]> storage_;
  T *data_;
};

}  // namespace momkd
