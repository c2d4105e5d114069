// Replaces libtorch's parallel_for by one that a sanitizer can follow: it starts a new thread for
// each index.
//
// OpenMP's threads synchronise inside a library that is not built with ThreadSanitizer, which would
// therefore report races in correct code. A new thread also begins without scratch buffers, so that
// their size is the requested one and not that of an earlier call.

#include <torch/csrc/stable/c/shim.h>

#include <thread>
#include <vector>

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body,
                                  void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i++) threads.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
