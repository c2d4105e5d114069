// Tensors as the kernels see them, and the checks at the door that make them so.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>

#include "gemm.h"

namespace dense_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [N, H, W, C] activations whose pixels are `stride` elements apart: H and W are dense.
template <class T>
struct Pixels {
  T* data;
  int64_t images, height, width, channels, stride;

  int64_t count() const { return images * height * width; }
  T* at(int64_t pixel) const { return data + pixel * stride; }
};

// A convolution weight [out, in, kh, kw] of any strides.
template <class T>
struct Weight {
  T* data;
  int64_t out, in;
  int64_t out_stride, in_stride, row_stride, column_stride;

  // Tap t of a 3x3 kernel, in row-major order.
  int64_t tap_offset(int64_t t) const { return t / 3 * row_stride + t % 3 * column_stride; }
};

// The tensor's pixels [rows) and channels [columns), to be fetched during a product.
template <class T>
Prefetch fetch_pixels(const Pixels<T>& pixels, Range rows, Range columns) {
  constexpr int64_t kSize = sizeof(T);
  return {pixels.at(rows.begin) + columns.begin, rows.size(), columns.size() * kSize,
          pixels.stride * kSize};
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", toString(t.scalar_type()),
                  ", expected ", toString(type));
}

// The tensor as Pixels<T>, T const for inputs.
template <class T>
Pixels<T> pixels(const Tensor& t, const char* name) {
  check_type(t, name, scalar_type_of<std::remove_const_t<T>>());
  STD_TORCH_CHECK(t.dim() == 4 && t.size(3) > 0, name, " must be [N, H, W, C], got ", shape_of(t));
  Pixels<T> p{static_cast<T*>(t.data_ptr()), t.size(0), t.size(1), t.size(2), t.size(3), 0};
  if (t.numel() == 0) return p;
  // The stride of a dimension of size 1 says nothing: take the innermost one that does.
  p.stride = p.width > 1    ? t.stride(2)
             : p.height > 1 ? t.stride(1)
             : p.images > 1 ? t.stride(0)
                            : p.channels;
  const int64_t row = p.width * p.stride;
  STD_TORCH_CHECK(
      p.stride >= p.channels && (p.channels == 1 || t.stride(3) == 1) &&
          (p.height == 1 || t.stride(1) == row) && (p.images == 1 || t.stride(0) == p.height * row),
      name, " of shape ", shape_of(t), " must be NHWC with dense H and W, and unit stride along C");
  return p;
}

// As above, of the same N, H, W as `like` and with `channels` channels.
template <class T, class U>
Pixels<T> pixels(const Tensor& t, const char* name, const Pixels<U>& like, int64_t channels) {
  const Pixels<T> p = pixels<T>(t, name);
  STD_TORCH_CHECK(p.images == like.images && p.height == like.height && p.width == like.width &&
                      p.channels == channels,
                  name, " has shape ", shape_of(t), ", expected [", like.images, ", ", like.height,
                  ", ", like.width, ", ", channels, "]");
  return p;
}

// Dense per-channel values of `count` elements in all (sums are [2, C]).
template <class T>
T* channels(const Tensor& t, const char* name, int64_t count) {
  check_type(t, name, scalar_type_of<std::remove_const_t<T>>());
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), name, " of shape ", shape_of(t),
                  " must be contiguous with ", count, " elements");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* channels(const std::optional<Tensor>& t, const char* name, int64_t count) {
  return t ? channels<T>(*t, name, count) : nullptr;
}

template <class T>
Weight<T> weight_of(const Tensor& t, const char* name, int64_t out, int64_t in, int64_t size) {
  check_type(t, name, scalar_type_of<std::remove_const_t<T>>());
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == out && t.size(1) == in && t.size(2) == size && t.size(3) == size,
      name, " has shape ", shape_of(t), ", expected [", out, ", ", in, ", ", size, ", ", size, "]");
  return {
      static_cast<T*>(t.data_ptr()), out, in, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// A weight gradient that may be absent: then its data is null.
template <class T>
Weight<T> weight_of(const std::optional<Tensor>& t, const char* name, int64_t out, int64_t in,
                    int64_t size) {
  return t ? weight_of<T>(*t, name, out, in, size) : Weight<T>{};
}

template <class T>
struct Tag {
  using type = T;
};

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

}  // namespace dense_ext
