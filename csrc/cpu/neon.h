// The register tile of pairs for NEON's matrix instruction.
//
// BFMMLA multiplies 2 rows of 4 bfloat16 values with 2 columns of 4, and adds to 2 x 2 float32: 16
// multiply-adds, where BFDOT has 8. The 4 values are two pairs of the depth. A tile is 8 rows and 8
// columns: 16 accumulators, 4 registers of b, and a. With 12 rows GCC runs out of registers.
//
// No processor has run it: tests run it in QEMU.

#pragma once

#include <algorithm>
#include <utility>

#include "gemm.h"

namespace dense_ext::neon {

// Computes a tile of C. A processor without the instruction has no definition, and never calls it.
template <int kRows, int kVectors>
void product_kernel(const Product<Pair>& p, const Pair* a, const Pair* b, float* c);

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

// kCount pairs, then zeros.
template <int kCount>
inline uint32x4_t load_pairs(const Pair* pairs) {
  if constexpr (kCount == 2) {
    uint32x2_t half;  // on its own, for GCC keeps a part of a vector in memory
    std::memcpy(&half, pairs, sizeof half);
    return vcombine_u32(half, uint32x2_t{});
  }
  uint32x4_t v = {};
  std::memcpy(&v, pairs, kCount * sizeof *pairs);
  return v;
}

// Rows 2r and 2r + 1 of a tile of a, in two steps of the depth or in its last. a is dense along the
// depth, or along its rows.
template <int kRows, int r, bool kDense, bool kTwoSteps>
inline uint32x4_t rows_of_a(const Pair* a, int64_t row, int64_t depth) {
  if constexpr (kDense) {
    constexpr int kSteps = kTwoSteps ? 2 : 1, kSecond = std::min(2 * r + 1, kRows - 1);
    return vcombine_u32(vget_low_u32(load_pairs<kSteps>(a + 2 * r * row)),
                        vget_low_u32(load_pairs<kSteps>(a + kSecond * row)));
  } else {
    constexpr int kFirst = r / 2 * 4, kCount = std::min(4, kRows - kFirst);
    const auto first = load_pairs<kCount>(a + kFirst);
    const auto second = kTwoSteps ? load_pairs<kCount>(a + depth + kFirst) : uint32x4_t{};
    return r % 2 ? vzip2q_u32(first, second) : vzip1q_u32(first, second);
  }
}

// acc[r][j] holds rows 2r and 2r + 1 of columns 2j and 2j + 1.
template <int kRows, int kVectors>
struct Tile {
  static constexpr int kRowPairs = (kRows + 1) / 2, kColumnPairs = 2 * kVectors;
  float32x4_t acc[kRowPairs][kColumnPairs] = {};

  template <bool kDense, bool kTwoSteps, int... r>
  void step(const Product<Pair>& p, const Pair* a, const Pair* b,
            std::integer_sequence<int, r...>) {
    uint32x4_t columns[kColumnPairs];
    DENSE_UNROLL for (int v = 0; v < kVectors; v++) {
      const Pair* at = b + v * kLanes<Pair>;
      const auto first = load_pairs<4>(at);
      const auto second = kTwoSteps ? load_pairs<4>(at + p.b_depth) : uint32x4_t{};
      columns[2 * v] = vzip1q_u32(first, second);
      columns[2 * v + 1] = vzip2q_u32(first, second);
    }
    const auto multiply_rows = [&](float32x4_t* sums, uint32x4_t rows) {
      DENSE_UNROLL for (int j = 0; j < kColumnPairs; j++) {
        sums[j] =
            vbfmmlaq_f32(sums[j], vreinterpretq_bf16_u32(rows), vreinterpretq_bf16_u32(columns[j]));
      }
    };
    (multiply_rows(acc[r], rows_of_a<kRows, r, kDense, kTwoSteps>(a, p.a_row, p.a_depth)), ...);
  }

  template <bool kDense>
  void multiply(const Product<Pair>& p, const Pair* a, const Pair* b) {
    constexpr std::make_integer_sequence<int, kRowPairs> kAll;
    int64_t k = 0;
    for (; k + 2 <= p.depth; k += 2, a += 2 * p.a_depth, b += 2 * p.b_depth) {
      step<kDense, true>(p, a, b, kAll);
    }
    if (k < p.depth) step<kDense, false>(p, a, b, kAll);
  }

  // The sums of row `row` in columns [4v, 4v + 4).
  Vector<float> sums(int row, int v) const {
    const auto left = vreinterpretq_f64_f32(acc[row / 2][2 * v]);
    const auto right = vreinterpretq_f64_f32(acc[row / 2][2 * v + 1]);
    return (Vector<float>)(row % 2 ? vzip2q_f64(left, right) : vzip1q_f64(left, right));
  }
};

template <int kRows, int kVectors>
void product_kernel(const Product<Pair>& p, const Pair* a, const Pair* b, float* c) {
  Tile<kRows, kVectors> tile;
  for (int64_t tap = 0; tap < p.taps; tap++) {
    const Pair* at = a + (p.a_taps ? p.a_taps[tap] : 0);
    const Pair* bt = b + (p.b_taps ? p.b_taps[tap] : 0);
    p.a_depth == 1 ? tile.template multiply<true>(p, at, bt)
                   : tile.template multiply<false>(p, at, bt);
  }
  DENSE_UNROLL for (int r = 0; r < kRows; r++) {
    DENSE_UNROLL for (int v = 0; v < kVectors; v++) {
      float* out = c + r * p.c_row + v * kLanes<float>;
      const Vector<float> sums = tile.sums(r, v);
      store(out, p.accumulate ? sums + load(out) : sums);
    }
  }
}

#endif

}  // namespace dense_ext::neon
