// The storage types of activations, their bits, and conversions between them and float. For
// device.cuh, which includes it.

#pragma once

#include <cstdint>
#include <cstring>

namespace dense_ext {

struct BFloat16 {
  static constexpr bool kIsHalf = false;
  uint16_t bits;
};
struct Half {
  static constexpr bool kIsHalf = true;
  uint16_t bits;
};

struct Float2 {
  float x, y;
};

// An unsigned integer as wide as T.
template <class T>
struct BitsOfSize {
  using type = uint16_t;
};
template <>
struct BitsOfSize<float> {
  using type = uint32_t;
};
template <class T>
using BitsOf = typename BitsOfSize<T>::type;

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
__device__ __forceinline__ uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// Two values of a 16-bit type in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <class T>
__device__ __forceinline__ uint32_t pack_relu(float x, float y);
template <class T>
__device__ __forceinline__ Float2 unpack(uint32_t bits);

#ifdef DENSE_EXT_EMULATOR
template <>
inline uint32_t pack<BFloat16>(float x, float y) {
  return emulator::bfloat16_of(x) | uint32_t{emulator::bfloat16_of(y)} << 16;
}
template <>
inline uint32_t pack<Half>(float x, float y) {
  return emulator::half_of(x) | uint32_t{emulator::half_of(y)} << 16;
}
template <class T>
inline uint32_t pack_relu(float x, float y) {
  return pack<T>(x <= 0 ? 0 : x, y <= 0 ? 0 : y);
}
template <>
inline Float2 unpack<Half>(uint32_t bits) {
  return {emulator::float_of_half(static_cast<uint16_t>(bits)),
          emulator::float_of_half(static_cast<uint16_t>(bits >> 16))};
}
#else
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float x, float y) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack_relu<BFloat16>(float x, float y) {
  uint32_t bits;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float x, float y) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack_relu<Half>(float x, float y) {
  uint32_t bits;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}
template <>
__device__ __forceinline__ Float2 unpack<Half>(uint32_t bits) {
  Float2 f;
  asm("{.reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;}"
      : "=f"(f.x), "=f"(f.y)
      : "r"(bits));
  return f;
}
#endif
template <>
__device__ __forceinline__ Float2 unpack<BFloat16>(uint32_t bits) {
  return {float_of_bits(bits << 16), float_of_bits(bits & 0xffff0000u)};
}

__device__ __forceinline__ float to_float(float x) { return x; }
// NaN stays NaN, as in PyTorch.
__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return unpack<T>(x.bits).x;
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
  }
}

// Rounded to T and widened again: the value as stored.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace dense_ext
