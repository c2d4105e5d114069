// Tensors on a GPU: the storage types of the CUDA kernels, and the views and checks of ../tensor.h.

#pragma once

#include "../range.h"
#include "../tensor.h"
#include "device.cuh"

namespace dense_ext {

template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<Half> = ScalarType::Half;

inline void check_device(const Tensor& t, const char* name) {
#ifdef DENSE_EXT_EMULATOR
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
#else
  int current = 0;
  STD_TORCH_CHECK(t.is_cuda(), name, " is not on a GPU");
  STD_TORCH_CHECK(cudaGetDevice(&current) == cudaSuccess && t.get_device_index() == current, name,
                  " is on GPU ", t.get_device_index(), ", other tensors on GPU ", current);
#endif
}

// Calls body(Tag<T>{}) for the tensor's storage type.
template <class Body>
void dispatch(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, "dtype ", toString(t.scalar_type()),
                      " is not one of float32, bfloat16, float16");
  }
}

// Channels [first, first + count).
template <class T>
Pixels<T> slice(Pixels<T> p, int64_t first, int64_t count) {
  p.data += first;
  p.channels = count;
  return p;
}

// The number of bytes that one access to global memory may move: the largest power of two, up to
// 16, that divides every address and every distance that was added.
class AccessBytes {
 public:
  template <class T>
  AccessBytes& add(const Pixels<T>& p) {
    // Bytes in 32 bits.
    STD_TORCH_CHECK(p.stride < int64_t{1} << 30, "pixels are ", p.stride, " elements apart");
    return add(p.data, p.channels, p.count() > 1 ? p.stride : 0);
  }
  // Adds the rows of a matrix, whose columns are contiguous.
  template <class T>
  AccessBytes& add(const T* data, int64_t columns, int64_t row_stride) {
    bits_ |= reinterpret_cast<uintptr_t>(data);
    bits_ |= static_cast<uintptr_t>(columns * int64_t{sizeof(T)});
    bits_ |= static_cast<uintptr_t>(row_stride * int64_t{sizeof(T)});
    return *this;
  }
  operator int() const { return static_cast<int>(bits_ & (~bits_ + 1)); }

 private:
  uintptr_t bits_ = 16;
};

}  // namespace dense_ext
