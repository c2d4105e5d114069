// Launching kernels on PyTorch's current stream, and the properties of the current device.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "device.cuh"
#include "tensor.cuh"

#ifndef DENSE_EXT_EMULATOR
#include <mutex>
#include <vector>

// Weak, because a PyTorch without CUDA lacks it, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace dense_ext {

struct Device {
  int multiprocessors;
  int shared_bytes;                 // maximum per block
  int multiprocessor_shared_bytes;  // for all blocks on a multiprocessor
};

#ifdef DENSE_EXT_EMULATOR

inline Device current_device() {
  const int bytes = emulator::settings().shared_bytes;
  return {emulator::settings().multiprocessors, bytes, bytes + 1024};
}

#else

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value;
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline int device_count() {
  int count;
  check_cuda(cudaGetDeviceCount(&count));
  return count;
}

inline int current_device_index() {
  int index;
  check_cuda(cudaGetDevice(&index));
  return index;
}

inline Device current_device() {
  static const std::vector<Device> devices = [] {
    std::vector<Device> found;
    for (int i = 0; i < device_count(); i++) {
      found.push_back({attribute(cudaDevAttrMultiProcessorCount, i),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i),
                       attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, i)});
    }
    return found;
  }();
  return devices[current_device_index()];
}

#endif

// Makes a tensor's device the current one while an op runs.
class OnDeviceOf {
 public:
#ifdef DENSE_EXT_EMULATOR
  explicit OnDeviceOf(const Tensor&) {}
#else
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Shared memory per block available on every supported GPU (the limit of 8.6, 8.9 and 12.0).
constexpr int kSmallestSharedBytes = 99 << 10;

struct Launch {
  int64_t x, y;
  int threads;
  int shared_bytes = 0;
};

// Runs kKernel(args) over the grid.
template <auto kKernel, class Arguments>
void launch(const Launch& on, const Arguments& args DENSE_EXT_AT_PLACE) {
  const Device device = current_device();
  STD_TORCH_CHECK(on.shared_bytes <= device.shared_bytes, "a kernel needs ", on.shared_bytes,
                  " bytes of shared memory, this GPU has ", device.shared_bytes);
#ifdef DENSE_EXT_EMULATOR
  emulator::run(
      {static_cast<int>(on.x), static_cast<int>(on.y), on.threads, on.shared_bytes},
      [&] { kKernel(args); }, __PRETTY_FUNCTION__, place);
#else
  const int index = current_device_index();
  // More than 48 KiB must be requested: request the maximum, once for each device.
  static std::vector<std::once_flag> asked(device_count());
  std::call_once(asked[index], [&] {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    device.shared_bytes));
  });
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  void* arguments[] = {const_cast<Arguments*>(&args)};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kKernel),
                              dim3(static_cast<unsigned>(on.x), static_cast<unsigned>(on.y)),
                              dim3(on.threads), arguments, on.shared_bytes,
                              static_cast<cudaStream_t>(stream)));
#endif
}

// The number of blocks that share `tiles` tiles of work in each of `columns` columns of the grid:
// as many as run at once, but at most one per tile.
inline int64_t persistent_blocks(int64_t tiles, int64_t columns, int blocks_per_multiprocessor,
                                 int shared_bytes) {
  const Device device = current_device();
  constexpr int kReserved = 1024;  // bytes of shared memory that CUDA reserves per block
  const int64_t fit = std::max(1, device.multiprocessor_shared_bytes / (shared_bytes + kReserved));
  const int64_t at_once =
      device.multiprocessors * std::min<int64_t>(fit, blocks_per_multiprocessor);
  return std::max<int64_t>(1, std::min(tiles, at_once / columns));
}

// Scratch memory for `count` floats on the tensor's device. It is freed when the op returns; the
// stream runs the op's kernels before any kernel that gets the memory next.
inline Tensor scratch(int64_t count, const Tensor& like) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

// A 1x1 weight's tensor, copied if the elements of a row are not contiguous; makes `w` its view.
template <class T>
Tensor with_dense_rows(const Tensor& weight, Weight<const T>& w) {
  // Distances of rows are bytes in 32 bits.
  if ((w.in == 1 || w.in_stride == 1) && w.out_stride < int64_t{1} << 30) return weight;
  const Tensor dense = torch::stable::contiguous(weight);
  w = weight_of<const T>(dense, "weight", w.out, w.in, 1);
  return dense;
}

inline void zero(const Tensor& tensor) { torch::stable::fill_(tensor, 0); }

}  // namespace dense_ext
