// One SIMD vector of the accumulation type, loaded from and stored to any storage type.
//
// It is written with GCC's and clang's vector extensions, so that the same source compiles for
// AVX-512, AVX2, SSE and NEON. Intrinsics appear only for what the extensions lack: masked access,
// fp16, and bfloat16's conversions and products. The storage type T is double, float, bfloat16,
// half or Mixed; the accumulation type Acc<T> is double for double, else float.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define DENSE_UNROLL _Pragma("unroll")
#else
#define DENSE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dense_ext {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int64_t kVectorBytes = 16;
constexpr bool kManyRegisters = true;
#else
constexpr int64_t kVectorBytes = 16;
constexpr bool kManyRegisters = false;
#endif

// float32 activations whose convolutions have weights in bfloat16, and round the other factor too.
// This is what autocast makes of them.
struct Mixed {
  float value;
};

// The type in which the weights of convolutions of T, and their gradients, are stored.
template <class T>
using WeightOf = std::conditional_t<std::is_same_v<T, Mixed>, BFloat16, T>;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int64_t kLanes = kVectorBytes / int64_t{sizeof(Acc<T>)};

// Raw holds the bits of one vector's elements of T, as a load or store moves them; Vector holds the
// elements widened.
template <class T>
struct Types {  // for the 16-bit types
  typedef uint16_t Raw __attribute__((vector_size(kVectorBytes / 2)));
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Types<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef Raw Vector;
};
template <>
struct Types<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef Raw Vector;
};
template <>
struct Types<Mixed> : Types<float> {};
template <class T>
using Raw = typename Types<T>::Raw;
template <class T>
using Vector = typename Types<T>::Vector;

typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

// An access to a whole vector. Other accesses pass an int64_t, the number of leading lanes.
struct Full {};

// --- raw access ------------------------------------------------------------------------------

template <class T>
inline Raw<T> load_raw(const T* p, Full) {
  Raw<T> raw;
  std::memcpy(&raw, p, sizeof raw);
  return raw;
}

template <class T>
inline void store_raw(T* p, Raw<T> raw, Full) {
  std::memcpy(p, &raw, sizeof raw);
}

#if defined(__AVX512F__)

template <class T>
inline Raw<T> load_raw(const T* p, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return (Raw<T>)_mm512_maskz_loadu_ps(mask, p);
  } else if constexpr (std::is_same_v<T, double>) {
    return (Raw<T>)_mm512_maskz_loadu_pd(mask, p);
  } else {
    return (Raw<T>)_mm256_maskz_loadu_epi16(mask, p);
  }
}

template <class T>
inline void store_raw(T* p, Raw<T> raw, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)raw);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, mask, (__m512d)raw);
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)raw);
  }
}

#else

template <class T>
inline Raw<T> load_raw(const T* p, int64_t count) {
  Raw<T> raw = {};
  for (int64_t i = 0; i < count; i++) std::memcpy((char*)&raw + i * sizeof(T), p + i, sizeof(T));
  return raw;
}

template <class T>
inline void store_raw(T* p, Raw<T> raw, int64_t count) {
  for (int64_t i = 0; i < count; i++) std::memcpy(p + i, (char*)&raw + i * sizeof(T), sizeof(T));
}

#endif

// --- conversion ------------------------------------------------------------------------------

template <class T>
inline Vector<T> widen(Raw<T> raw) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vector<T>)(__builtin_convertvector(raw, Bits) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Vector<T>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw);
#elif defined(__F16C__)
    return (Vector<T>)_mm256_cvtph_ps((__m128i)raw);
#else
    Vector<T> v;
    for (int64_t i = 0; i < kLanes<T>; i++)
      v[i] = static_cast<float>(Half(raw[i], Half::from_bits()));
    return v;
#endif
  } else {
    return raw;
  }
}

// Rounds to nearest even; NaN stays NaN.
template <class T>
inline Raw<T> narrow(Vector<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512BF16__)
    return (Raw<T>)_mm512_cvtneps_pbh((__m512)v);
#endif
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits quiet_nan = Bits{} + 0x7fc0u;
    return __builtin_convertvector(v != v ? quiet_nan : rounded, Raw<T>);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Raw<T>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Raw<T>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Raw<T> raw;
    for (int64_t i = 0; i < kLanes<T>; i++) raw[i] = Half(static_cast<float>(v[i])).x;
    return raw;
#endif
  } else {
    return v;
  }
}

// --- operations for the kernels --------------------------------------------------------------

// Lanes beyond `count` read as zero.
template <class T, class Count = Full>
inline Vector<T> load(const T* p, Count count = {}) {
  return widen<T>(load_raw(p, count));
}

template <class T, class Count = Full>
inline void store(T* p, Vector<T> v, Count count = {}) {
  store_raw(p, narrow<T>(v), count);
}

// ReLU and its backward mask. NaN passes through both, as in PyTorch.
template <class V>
inline V relu(V v) {
  return v < 0 ? V{} : v;
}

template <class V>
inline V relu_mask(V pre_activation, V grad) {
  return pre_activation <= 0 ? V{} : grad;
}

// One step of a transposition: swaps the off-diagonal blocks of a and b, which are `step` rows
// apart.
template <int step, class V, int... lane>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
#if defined(__clang__)
  const V upper = __builtin_shufflevector(a, b, (lane & step ? n + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? n + lane : lane + step)...);
#else  // gcc has __builtin_shufflevector only from version 12 on
  using Mask = decltype(a < b);
  const V upper = __builtin_shuffle(a, b, Mask{(lane & step ? n + lane - step : lane)...});
  b = __builtin_shuffle(a, b, Mask{(lane & step ? n + lane : lane + step)...});
#endif
  a = upper;
}

// Transposes kLanes vectors in place.
template <class T, int step = 1>
inline void transpose(Vector<T>* rows) {
  constexpr int n = kLanes<T>;
  DENSE_UNROLL
  for (int r = 0; r < n; r++) {
    if (!(r & step)) {
      swap_blocks<step>(rows[r], rows[r + step], std::make_integer_sequence<int, n>{});
    }
  }
  if constexpr (2 * step < n) transpose<T, 2 * step>(rows);
}

// --- operands of the matrix products ---------------------------------------------------------

// Two values that follow one another along the depth of a product, which multiplies and adds both
// at once.
struct Pair {
  BFloat16 first, second;
};

// Tests ask for pairs where the instruction set lacks them.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DENSE_EXT_PAIRS
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kNeonPairs = true;
#else
constexpr bool kNeonPairs = false;
#endif
#if defined(DENSE_EXT_PAIRS)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// An element of a product's operands: where the instruction set multiplies bfloat16 values, they
// are pairs if the weights are bfloat16; other values are widened.
template <class T>
using Operand = std::conditional_t<kPairs && std::is_same_v<WeightOf<T>, BFloat16>, Pair, Acc<T>>;

template <class E>
constexpr bool kIsPair = std::is_same_v<E, Pair>;

// The number of elements that hold `values` values along the depth.
template <class E>
constexpr int64_t elements(int64_t values) {
  return kIsPair<E> ? (values + 1) / 2 : values;
}

template <>
struct Types<Pair> {
  typedef Bits Raw;
  typedef Bits Vector;
};

// The pairs (first[i], second[i]), both rounded to bfloat16.
inline Bits pairs_of(Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  // One after the other in the halves of a vector, whose words are then interleaved.
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (Bits)_mm512_permutexvar_epi16((__m512i)(lane | (lane + 16) << 16), halves);
#else
  return __builtin_convertvector(narrow<BFloat16>(first), Bits) |
         __builtin_convertvector(narrow<BFloat16>(second), Bits) << 16;
#endif
}

// sum + a*b for an element a and a vector b. The products of pairs are summed in float32.
template <class E>
inline Vector<Acc<E>> multiply_add(Vector<Acc<E>> sum, E a, Vector<E> b) {
  if constexpr (kIsPair<E>) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
#if defined(__AVX512BF16__)
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits),
                                           (__m512bh)b);
#else
    const Bits both = Bits{} + bits;
    sum += (Vector<float>)(both << 16) * (Vector<float>)(b << 16);
    return sum + (Vector<float>)(both & 0xffff0000u) * (Vector<float>)(b & 0xffff0000u);
#endif
  } else {
    return sum + a * b;
  }
}

// --- loops over columns ----------------------------------------------------------------------

// Calls body(j, count) for each vector, at columns [j, j + kLanes), of a row of n columns.
template <class T, class Body>
inline void for_vectors(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(j, Full{});
  if (j < n) body(j, n - j);
}

// Calls body(j, width, count) for blocks of `width` vectors of columns: 4 at a time, then singly.
// Loops that sum over rows thus keep a block's sums in registers and read runs of 4 vectors.
template <class T, class Body>
inline void for_blocks(int64_t n, const Body& body) {
  constexpr int64_t kWide = 4;
  int64_t j = 0;
  for (; j + kWide * kLanes<T> <= n; j += kWide * kLanes<T>) {
    body(j, std::integral_constant<int, kWide>{}, Full{});
  }
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(j, std::integral_constant<int, 1>{}, Full{});
  if (j < n) body(j, std::integral_constant<int, 1>{}, n - j);
}

}  // namespace dense_ext
