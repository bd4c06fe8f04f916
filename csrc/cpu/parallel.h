// The one seam for threading. Tasks are independent; which thread runs one never changes its result.
#pragma once

#include <cstdint>
#include <exception>
#if defined(SAEREC_STD_THREADS)
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>
#endif

namespace saerec {

// After fork the child must not open an OpenMP region (libgomp's pool did not survive): everything runs serially there.
void set_serial(bool serial);
bool is_serial();

// A second thread pays off only above some tens of thousands of operations.
constexpr int64_t kMinOperationsPerThread = 1 << 16;

inline int useful_threads(int threads, int64_t operations) {
  if (is_serial() || threads <= 1) return 1;
  const int64_t limit = operations / kMinOperationsPerThread;
  if (limit <= 1) return 1;
  return limit < threads ? static_cast<int>(limit) : threads;
}

// Runs body(task) for task in [0, n_tasks). The first exception of a task is rethrown here.
template <class Body>
void parallel_for(int64_t n_tasks, int threads, const Body& body) {
  if (threads <= 1 || n_tasks <= 1 || is_serial()) {
    for (int64_t task = 0; task < n_tasks; ++task) body(task);
    return;
  }
  std::exception_ptr error;
#if defined(SAEREC_STD_THREADS)
  // ThreadSanitizer understands these, and not libgomp's barriers.
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  const auto work = [&] {
    for (int64_t task = next++; task < n_tasks; task = next++) {
      try {
        body(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
#else
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < n_tasks; ++task) {
    try {
      body(task);
    } catch (...) {
#pragma omp critical(saerec_parallel_for_error)
      if (!error) error = std::current_exception();
    }
  }
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace saerec
