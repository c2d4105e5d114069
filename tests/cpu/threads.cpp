// PyTorch's threads as a sanitizer can follow them, in libtorch's place: a thread for each index.
//
// OpenMP's threads hand each other work inside a library that is not compiled for ThreadSanitizer,
// which would take all that follows for a race. A new thread also begins with no scratch: what it
// takes is as large as asked for, not as an earlier call left it.

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
