// The one matrix product behind every convolution here: a tile in scratch times packed weights.

#pragma once

#include <cstdint>

#include "../range.h"
#include "vector.h"

namespace dense_ext {

// Rows and columns of the register tile: with 32 registers 14 x 2 accumulators leave room for two
// vectors of b and a broadcast; with 16, 6 x 2.
constexpr int kMaxRows = kManyRegisters ? 14 : 6;
constexpr int kMaxVectors = 2;

// Columns of a panel of b.
template <class A>
constexpr int64_t kPanel = kMaxVectors * kLanes<A>;

// Rows of a tensor that are needed after a product: brought into the L2 cache while it computes.
struct Prefetch {
  const void* data = nullptr;
  int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

  // The step-th of `steps` parts.
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

// C[i][j] (+)= sum over taps t and depth k of
//   a[a_taps[t] + i*a_row + k*a_depth] * b[(j / kPanel)*b_panel + b_taps[t] + k*b_depth + j %
//   kPanel]
// C's rows are written up to round_up(columns, kLanes). An accumulating product is summed apart
// before it is added, which keeps rounding errors of long sums (weight gradients) small.
template <class A>
struct Product {
  int64_t rows, columns, depth;
  const A* a;
  int64_t a_row, a_depth;
  const A* b;
  int64_t b_panel, b_depth;
  A* c;
  int64_t c_row;
  bool accumulate = false;
  int64_t taps = 1;
  const int64_t* a_taps = nullptr;  // null: all zero
  const int64_t* b_taps = nullptr;
  Prefetch prefetch[2] = {};
};

// Instantiated for float and double in gemm.cpp.
template <class A>
void multiply(const Product<A>& product);

// Weights as the b of a Product, in panels [columns / kPanel][taps][depth][kPanel], zero padded:
//   packed(t, k, j) = weights[taps[t] + k*k_stride + j*j_stride].
template <class T>
struct WeightsAsB {
  const T* weights;
  int64_t taps, depth, columns;
  int64_t k_stride, j_stride;
  const int64_t* tap_offsets;  // [taps]

  int64_t panels() const { return ceil_div(columns, kPanel<Acc<T>>); }
  int64_t packed_size() const { return panels() * taps * depth * kPanel<Acc<T>>; }
};

// Fills one [depth][kPanel] block of the packed weights: item = panel * taps + tap.
template <class T>
void pack_block(const WeightsAsB<T>& w, int64_t item, Acc<T>* packed) {
  using A = Acc<T>;
  const int64_t first = item / w.taps * kPanel<A>;
  const int64_t columns = first + kPanel<A> <= w.columns ? kPanel<A> : w.columns - first;
  const T* source = w.weights + w.tap_offsets[item % w.taps] + first * w.j_stride;
  A* block = packed + item * w.depth * kPanel<A>;
  if (columns < kPanel<A>) std::memset(block, 0, w.depth * kPanel<A> * sizeof(A));
  if (w.j_stride <= w.k_stride) {
    for (int64_t k = 0; k < w.depth; k++) {
      for (int64_t j = 0; j < columns; j++) {
        block[k * kPanel<A> + j] = static_cast<A>(source[k * w.k_stride + j * w.j_stride]);
      }
    }
  } else {
    constexpr int64_t kBlock = 64;  // rows of `block` that stay in the L1 cache while j goes round
    for (int64_t k0 = 0; k0 < w.depth; k0 += kBlock) {
      const int64_t k1 = k0 + kBlock < w.depth ? k0 + kBlock : w.depth;
      for (int64_t j = 0; j < columns; j++) {
        for (int64_t k = k0; k < k1; k++) {
          block[k * kPanel<A> + j] = static_cast<A>(source[k * w.k_stride + j * w.j_stride]);
        }
      }
    }
  }
}

}  // namespace dense_ext
