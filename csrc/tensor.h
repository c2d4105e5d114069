// Views of tensors for the kernels of every backend, and the checks when a view is made.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

// Marks functions that kernels on a GPU call too.
#ifdef __CUDACC__
#define DENSE_EXT_HOST_DEVICE __host__ __device__
#else
#define DENSE_EXT_HOST_DEVICE
#endif

// Whether the kernels take volumes [N, D, H, W, C] too.
#ifdef DENSE_EXT_GPU
#define DENSE_EXT_VOLUMES false
#else
#define DENSE_EXT_VOLUMES true
#endif

namespace dense_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Activations [N, H, W, C] whose pixels are `stride` elements apart; H and W are dense. Volumes are
// seen as N*D images.
template <class T>
struct Pixels {
  T* data;
  int64_t images, height, width, channels, stride;

  DENSE_EXT_HOST_DEVICE int64_t count() const { return images * height * width; }
  DENSE_EXT_HOST_DEVICE T* at(int64_t pixel) const { return data + pixel * stride; }
};

// A convolution weight [out, in, kh, kw], or one plane of [out, in, kd, kh, kw], with any strides.
template <class T>
struct Weight {
  T* data;
  int64_t out, in;
  int64_t out_stride, in_stride, row_stride, column_stride;

  // The offset of tap t of a 3x3 kernel; taps are numbered in row-major order.
  DENSE_EXT_HOST_DEVICE int64_t tap_offset(int64_t t) const {
    return t / 3 * row_stride + t % 3 * column_stride;
  }
};

// The dtype of T. Each backend's tensor.h specialises it for the backend's storage types.
template <class T>
inline constexpr ScalarType kScalarType = ScalarType::Undefined;

// Refuses a tensor on a device that the backend does not run on. Each backend's tensor.h defines
// it.
inline void check_device(const Tensor& t, const char* name);

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  check_device(t, name);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", toString(t.scalar_type()),
                  ", expected ", toString(type));
}

// The tensor as Pixels<T>; T is const for inputs.
template <class T>
Pixels<T> pixels(const Tensor& t, const char* name) {
  check_type(t, name, kScalarType<std::remove_const_t<T>>);
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK((last == 3 || (DENSE_EXT_VOLUMES && last == 4)) && t.size(last) > 0, name,
                  " must be [N, H, W, C]", DENSE_EXT_VOLUMES ? " or [N, D, H, W, C]" : "", ", got ",
                  shape_of(t));
  const int64_t images = last == 4 ? t.size(0) * t.size(1) : t.size(0);
  Pixels<T> p{static_cast<T*>(t.data_ptr()),
              images,
              t.size(last - 2),
              t.size(last - 1),
              t.size(last),
              t.size(last)};
  if (t.numel() == 0) return p;
  // The stride of a dimension of size 1 is arbitrary, so take the innermost of a larger dimension.
  int64_t inner = last - 1;
  while (inner > 0 && t.size(inner) == 1) inner--;
  if (t.size(inner) > 1) p.stride = t.stride(inner);
  bool dense = p.stride >= p.channels && (p.channels == 1 || t.stride(last) == 1);
  for (int64_t d = last - 1, stride = p.stride; d >= 0; stride *= t.size(d--)) {
    dense = dense && (t.size(d) == 1 || t.stride(d) == stride);
  }
  STD_TORCH_CHECK(dense, name, " of shape ", shape_of(t),
                  " must be NHWC with dense H and W, and unit stride along C");
  return p;
}

// As above; also checks that N, H, W are those of `like` and that C is `channels`.
template <class T, class U>
Pixels<T> pixels(const Tensor& t, const char* name, const Pixels<U>& like, int64_t channels) {
  const Pixels<T> p = pixels<T>(t, name);
  STD_TORCH_CHECK(p.images == like.images && p.height == like.height && p.width == like.width &&
                      p.channels == channels,
                  name, " has shape ", shape_of(t), ", expected [", like.images, ", ", like.height,
                  ", ", like.width, ", ", channels, "]");
  return p;
}

// A dense per-channel vector with `count` elements in all (sums are [2, C]).
template <class T>
T* channels(const Tensor& t, const char* name, int64_t count) {
  check_type(t, name, kScalarType<std::remove_const_t<T>>);
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
  check_type(t, name, kScalarType<std::remove_const_t<T>>);
  const int64_t last = t.dim() - 1;
  bool fits =
      (last == 3 || (DENSE_EXT_VOLUMES && last == 4)) && t.size(0) == out && t.size(1) == in;
  for (int64_t d = 2; d <= last; d++) fits = fits && t.size(d) == size;
  STD_TORCH_CHECK(fits, name, " has shape ", shape_of(t), ", expected [", out, ", ", in, ", ", size,
                  ", ", size, "]", DENSE_EXT_VOLUMES ? ", or the same for volumes" : "");
  return {static_cast<T*>(t.data_ptr()),
          out,
          in,
          t.stride(0),
          t.stride(1),
          t.stride(last - 1),
          t.stride(last)};
}

// A weight gradient; if it is absent, `data` is null.
template <class T>
Weight<T> weight_of(const std::optional<Tensor>& t, const char* name, int64_t out, int64_t in,
                    int64_t size) {
  return t ? weight_of<T>(*t, name, out, in, size) : Weight<T>{};
}

template <class T>
struct Tag {
  using type = T;
};

}  // namespace dense_ext
