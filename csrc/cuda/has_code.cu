// has_code: whether the library was compiled for a GPU, or has PTX that the driver can compile.

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace dense_ext {
namespace {

#ifdef DENSE_EXT_EMULATOR

bool has_code(int64_t) { return true; }

#else

__global__ void empty_kernel() {}

bool has_code(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, empty_kernel);
  if (error == cudaSuccess) return true;
  cudaGetLastError();  // clears the error, which the next launch would report
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    return false;
  }
  check_cuda(error);  // any other error, such as a driver older than the library's CUDA
  return false;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("has_code", TORCH_BOX(&has_code));
}

}  // namespace dense_ext
