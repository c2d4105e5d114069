// Vectors of neighbouring elements that a thread moves in one access.

#pragma once

#include "device.cuh"

namespace dense_ext {

// The elements in kBytes bytes, widened to float.
template <class T, int kBytes>
struct Vector {
  static constexpr int kSize = kBytes / static_cast<int>(sizeof(T));

  float value[kSize] = {};

  Vector() = default;
  __device__ explicit Vector(const Bytes<kBytes>& stored) {
    DENSE_EXT_UNROLL for (int i = 0; i < kSize; i++) {
      if constexpr (sizeof(T) == 4) {
        value[i] = float_of_bits(stored.data[i]);
      } else if constexpr (kSize == 1) {
        value[i] = to_float(T{stored.data[i]});
      } else {
        const Float2 pair = unpack<T>(stored.data[i / 2]);
        value[i] = i % 2 ? pair.y : pair.x;
      }
    }
  }

  // Rounded to T.
  __device__ Bytes<kBytes> stored() const {
    Bytes<kBytes> bytes;
    if constexpr (sizeof(T) == 4) {
      DENSE_EXT_UNROLL for (int i = 0; i < kSize; i++) bytes.data[i] = bits_of(value[i]);
    } else if constexpr (kSize == 1) {
      bytes.data[0] = from_float<T>(value[0]).bits;
    } else {
      DENSE_EXT_UNROLL for (int i = 0; i < kSize; i += 2) {
        bytes.data[i / 2] = pack<T>(value[i], value[i + 1]);
      }
    }
    return bytes;
  }
};

template <int kBytes, class T>
__device__ __forceinline__ Bytes<kBytes> load_bytes(const T* p) {
  return load_global(reinterpret_cast<const Bytes<kBytes>*>(p));
}
template <int kBytes, class T>
__device__ __forceinline__ void store_bytes(T* p, const Bytes<kBytes>& bytes) {
  store_global(reinterpret_cast<Bytes<kBytes>*>(p), bytes);
}

}  // namespace dense_ext
