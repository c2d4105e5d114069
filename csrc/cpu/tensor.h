// Tensors on the CPU: the storage types of its kernels, and the views and checks of ../tensor.h.

#pragma once

#include "../tensor.h"
#include "gemm.h"

namespace dense_ext {

template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<Half> = ScalarType::Half;
template <>
inline constexpr ScalarType kScalarType<Mixed> = ScalarType::Float;

inline void check_device(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
}

// Volumes [N, D, H, W, C] as N*D images. An image is a volume of one plane.
template <class T>
struct Volumes : Pixels<T> {
  int64_t planes;  // D
};

template <class T>
Volumes<T> volumes(const Tensor& t, const char* name) {
  return {pixels<T>(t, name), t.dim() == 5 ? t.size(1) : 1};
}

// As above; also checks that N, D, H, W are those of `like` and that C is `channels`.
template <class T, class U>
Volumes<T> volumes(const Tensor& t, const char* name, const Volumes<U>& like, int64_t channels) {
  const Volumes<T> v{pixels<T>(t, name, like, channels), t.dim() == 5 ? t.size(1) : 1};
  STD_TORCH_CHECK(v.planes == like.planes, name, " has volumes of ", v.planes, " planes, expected ",
                  like.planes);
  return v;
}

// A prefetch of the pixels `rows` and the channels `columns` of a tensor, for use during a product.
template <class T>
Prefetch fetch_pixels(const Pixels<T>& pixels, Range rows, Range columns) {
  constexpr int64_t kSize = sizeof(T);
  return {pixels.at(rows.begin) + columns.begin, rows.size(), columns.size() * kSize,
          pixels.stride * kSize};
}

// Calls body(Tag<T>{}) for the tensor's storage type.
template <class Body>
void dispatch(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return body(Tag<double>{});
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, "dtype ", toString(t.scalar_type()),
                      " is not one of float64, float32, bfloat16, float16");
  }
}

// The same for activations that meet a convolution's weight.
template <class Body>
void dispatch(const Tensor& t, const Tensor& weight, const Body& body) {
  if constexpr (kPairs) {
    if (t.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::BFloat16) {
      return body(Tag<Mixed>{});
    }
  }
  dispatch(t, body);
}

}  // namespace dense_ext
