// The 2x2 windows of bn_relu_pool_conv1x1.cu: a thread's part of one, activated and pooled.

#pragma once

#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 256;

// The index of the first pixel of an output pixel's window.
template <class T>
__device__ __forceinline__ int64_t corner_of(const Pixels<T>& x, int64_t window) {
  const int64_t out_height = x.height / 2, out_width = x.width / 2;
  const int64_t line = window / out_width;  // counted over all images
  return (line / out_height * x.height + line % out_height * 2) * x.width + window % out_width * 2;
}

// A thread loads 16 bytes of a pixel at a time, which is a unit of its channels, and computes with
// four channels at a time.
template <class T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));

// Converts the q-th four channels of a unit to and from float.
template <class T>
__device__ __forceinline__ void widen(float (&four)[4], const Bytes<16>& unit, int q) {
  DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      const Float2 pair = unpack<T>(unit.data[2 * q + i / 2]);
      four[i] = i % 2 ? pair.y : pair.x;
    } else {
      four[i] = float_of_bits(unit.data[i]);
    }
  }
}
template <class T>
__device__ __forceinline__ void narrow(Bytes<16>& unit, int q, const float (&four)[4]) {
  if constexpr (sizeof(T) == 2) {
    unit.data[2 * q] = pack<T>(four[0], four[1]);
    unit.data[2 * q + 1] = pack<T>(four[2], four[3]);
  } else {
    DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) unit.data[i] = bits_of(four[i]);
  }
}

// Loads and stores four floats in shared memory.
__device__ __forceinline__ void load_four(float (&four)[4], const float* at) {
  widen<float>(four, load_shared(reinterpret_cast<const Bytes<16>*>(at)), 0);
}
__device__ __forceinline__ void store_four(float* at, const float (&four)[4]) {
  Bytes<16> unit;
  narrow<float>(unit, 0, four);
  store_shared(reinterpret_cast<Bytes<16>*>(at), unit);
}

// A thread's unit of each pixel of a window.
template <class T>
struct Window {
  Bytes<16> pixels[4];

  // Loads from x; the unit of the window's first pixel is at `corner`. Channels from `columns` on
  // become zeros.
  __device__ __forceinline__ void load(const Pixels<const T>& x, const T* corner, int columns,
                                       int bytes) {
    DENSE_EXT_UNROLL for (auto& pixel : pixels) pixel = {};
    for_accesses(x, columns, bytes, [&](auto width, void* part, int64_t offset) {
      using V = Bytes<decltype(width)::value>;
      const V value = load_global(reinterpret_cast<const V*>(corner + offset));
      memcpy(part, &value, sizeof value);
    });
  }

  // Stores the channels below `columns` to x.
  __device__ __forceinline__ void store(const Pixels<T>& x, T* corner, int columns, int bytes) {
    for_accesses(x, columns, bytes, [&](auto width, void* part, int64_t offset) {
      using V = Bytes<decltype(width)::value>;
      V value;
      memcpy(&value, part, sizeof value);
      store_global(reinterpret_cast<V*>(corner + offset), value);
    });
  }

  // The unit of p. Its scale and shift are in shared memory, in groups of four that are kStride
  // apart.
  template <int kStride>
  __device__ __forceinline__ Bytes<16> pooled(const float* scales, const float* shifts) const {
    Bytes<16> unit;
    DENSE_EXT_UNROLL for (int q = 0; q < kUnit<T> / 4; q++) {
      float scale[4], shift[4], sum[4] = {};
      load_four(scale, scales + q * kStride);
      load_four(shift, shifts + q * kStride);
      DENSE_EXT_UNROLL for (const auto& pixel : pixels) {
        float value[4];
        widen<T>(value, pixel, q);
        DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) sum[i] += relu(value[i] * scale[i] + shift[i]);
      }
      DENSE_EXT_UNROLL for (auto& value : sum) value *= 0.25f;
      narrow<T>(unit, q, sum);
    }
    return unit;
  }

 private:
  // Calls body(Width<n>{}, part of a unit, its offset from the corner) for each access to x.
  template <class Like, class Body>
  __device__ __forceinline__ void for_accesses(const Pixels<Like>& x, int columns, int bytes,
                                               const Body& body) {
    DENSE_EXT_UNROLL for (int pixel = 0; pixel < 4; pixel++) {
      const int64_t offset = (pixel / 2 * x.width + pixel % 2) * x.stride;
      // Inside the loop, since single elements of all pixels at once would take twice the
      // registers.
      for_width<T>(bytes, [&](auto width) {
        constexpr int kElements = decltype(width)::value / static_cast<int>(sizeof(T));
        DENSE_EXT_UNROLL for (int i = 0; i < kUnit<T>; i += kElements) {
          if (i >= columns) continue;
          body(width, reinterpret_cast<T*>(&pixels[pixel]) + i, offset + i);
        }
      });
    }
  }
};

}  // namespace
}  // namespace dense_ext
