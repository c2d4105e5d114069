// The matrix product behind every convolution on the CPU: a tile in scratch times packed weights.

#pragma once

#include <cstdint>

#include "../range.h"
#include "vector.h"

namespace dense_ext {

// The rows of the register tile, and its columns in vectors. With 32 registers, 14 x 2 accumulators
// leave room for two vectors of b and a broadcast; with 16 registers, 6 x 2 do. NEON's pairs:
// neon.h.
template <class E>
constexpr int kMaxRows = !kManyRegisters            ? 6
                         : kIsPair<E> && kNeonPairs ? 8
                                                    : 14;
constexpr int kMaxVectors = 2;

// The columns of a panel of b.
template <class E>
constexpr int64_t kPanel = kMaxVectors * kLanes<E>;

// Rows of a tensor that are needed after a product and are prefetched into L2 while it computes.
struct Prefetch {
  const void* data = nullptr;
  int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

  // Prefetches part number `step` of `steps` parts.
  void fetch(int64_t step, int64_t steps) const {
    constexpr int64_t kCacheLine = 64;
    const char* first = static_cast<const char*>(data);
    for (int64_t r = rows * step / steps; r < rows * (step + 1) / steps; r++) {
      for (int64_t b = 0; b < row_bytes; b += kCacheLine) {
        __builtin_prefetch(first + r * stride_bytes + b, 0, 2);
      }
    }
  }
};

// C[i][j] (+)= sum over taps t and depth k of a[a_taps[t] + i*a_row + k*a_depth] *
//   b[(j / kPanel)*b_panel + b_taps[t] + k*b_depth + j % kPanel]
// The depth and all strides count elements; if an element is a Pair, a product of elements is the
// sum of two products of values. Each row of C is written up to column round_up(columns, kLanes).
// An accumulating product is summed on its own before it is added to C, which keeps the rounding
// errors of long sums (weight gradients) small.
template <class E>
struct Product {
  int64_t rows, columns, depth;
  const E* a;
  int64_t a_row, a_depth;
  const E* b;
  int64_t b_panel, b_depth;
  Acc<E>* c;
  int64_t c_row;
  bool accumulate = false;
  int64_t taps = 1;
  const int64_t* a_taps = nullptr;  // null: all zero
  const int64_t* b_taps = nullptr;
  Prefetch prefetch[2] = {};
};

// Instantiated for float, double and, if products take pairs, Pair in gemm.cpp.
template <class E>
void multiply(const Product<E>& product);

// Weights as the b of a Product, in panels [columns / kPanel][taps][elements of depth][kPanel],
// zero padded:
//   packed(t, k, j) = weights[tap_offsets[t] + k*k_stride + j*j_stride].
template <class T>
struct WeightsAsB {
  using E = Operand<T>;
  const T* weights;
  int64_t taps, depth, columns;
  int64_t k_stride, j_stride;
  const int64_t* tap_offsets;  // [taps]

  int64_t panels() const { return ceil_div(columns, kPanel<E>); }
  int64_t packed_size() const { return panels() * taps * tap_stride(); }
  int64_t tap_stride() const { return elements<E>(depth) * kPanel<E>; }

  // Whether the taps of one k are contiguous, and followed by those of the next k.
  bool taps_innermost() const {
    for (int64_t t = 0; t < taps; t++) {
      if (tap_offsets[t] != t) return false;
    }
    return k_stride == taps;
  }
};

// Writes values of row `k` of the depth into a panel. The first value of a pair is written before
// the second; until then the second is zero.
template <class T>
void put_row(Vector<T> values, int64_t k, Operand<T>* panel) {
  using E = Operand<T>;
  E* target = panel + (kIsPair<E> ? k / 2 : k) * kPanel<E>;
  if constexpr (kIsPair<E>) {
    const Bits bits = (Bits)values;  // a bfloat16 value is the upper half of a float
    store(target, k % 2 ? load(target) | bits : bits >> 16);
  } else {
    store(target, values);
  }
}

// Transposes values into a panel of kPanel columns, zero padded. In `source`, the `rows` values of
// a column are contiguous, and the `columns` columns are `stride` apart. Consecutive rows belong to
// consecutive taps, which are tap_stride apart in `target`; after the last tap follows the first
// tap's next row of the depth.
template <class T>
void transpose_into_panel(const T* source, int64_t stride, int64_t rows, int64_t columns,
                          Operand<T>* target, int64_t taps, int64_t tap_stride) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t j = 0; j < kPanel<Operand<T>>; j += n, source += n * stride, target += n) {
    int64_t tap = 0, k = 0;
    for (int64_t i = 0; i < rows; i += n) {
      Vector<T> block[n];
      if (i + n <= rows && j + n <= columns) {
        DENSE_UNROLL
        for (int64_t r = 0; r < n; r++) block[r] = load(source + i + r * stride);
      } else {
        const int64_t count = rows - i < n ? rows - i : n;
        for (int64_t r = 0; r < n; r++) {
          block[r] = j + r < columns ? load(source + i + r * stride, count) : Vector<T>{};
        }
      }
      transpose<T>(block);
      DENSE_UNROLL
      for (int64_t r = 0; r < n; r++) {
        if (i + r < rows) put_row<T>(block[r], k, target + tap * tap_stride);
        if (++tap == taps) {
          tap = 0;
          k++;
        }
      }
    }
  }
}

// Fills the rows `k` of every tap in one panel of the packed weights; k.begin is even.
template <class T>
void pack_rows(const WeightsAsB<T>& w, int64_t panel, Range k, Operand<T>* packed) {
  using E = Operand<T>;
  constexpr int64_t n = kLanes<T>;
  const int64_t first = panel * kPanel<E>, tap_stride = w.tap_stride();
  const int64_t columns = first + kPanel<E> <= w.columns ? kPanel<E> : w.columns - first;
  const T* source = w.weights + k.begin * w.k_stride + first * w.j_stride;
  E* target = packed + panel * w.taps * tap_stride + elements<E>(k.begin) * kPanel<E>;
  if (w.taps_innermost()) {
    transpose_into_panel(source, w.j_stride, k.size() * w.taps, columns, target, w.taps,
                         tap_stride);
    return;
  }
  for (int64_t t = 0; t < w.taps; t++, target += tap_stride) {
    const T* tap = source + w.tap_offsets[t];
    if (w.k_stride == 1) {
      transpose_into_panel(tap, w.j_stride, k.size(), columns, target, 1, 0);
      continue;
    }
    Acc<T> row[kPanel<E>] = {};
    for (int64_t i = 0; i < k.size(); i++) {
      for (int64_t j = 0; j < columns; j++) {
        row[j] = static_cast<Acc<T>>(tap[i * w.k_stride + j * w.j_stride]);
      }
      for (int64_t j = 0; j < kPanel<E>; j += n) put_row<T>(load(row + j), i, target + j);
    }
  }
}

}  // namespace dense_ext
