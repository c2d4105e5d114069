// C = A B over a register tile of up to 14 rows and 2 vectors of columns (see gemm.h for strides).
//
// In each depth step, 2 vector loads of b and one broadcast of a per row feed 28 independent
// multiply-adds. So the tile runs at the arithmetic peak as long as b's panel streams from L1 or
// L2.

#include "gemm.h"

#include <array>
#include <utility>

namespace dense_ext {
namespace {

constexpr int64_t kNoOffset = 0;
// The depth steps of an iteration, if a is dense along the depth.
constexpr int kUnrolled = 4;

template <class A, int kRows, int kVectors>
void product_kernel(const Product<A>& p, const A* a, const A* b, A* c) {
  constexpr int kPointers = (kRows + 2) / 3;
  Vector<A> acc[kRows][kVectors] = {};
  const int64_t a_row = p.a_row, a_depth = p.a_depth, b_depth = p.b_depth, depth = p.depth;
  for (int64_t tap = 0; tap < p.taps; tap++) {
    const A* at = a + (p.a_taps ? p.a_taps[tap] : kNoOffset);
    const A* bt = b + (p.b_taps ? p.b_taps[tap] : kNoOffset);
    // A pointer for each three rows: an address reaches 0, 1 or 2 strides from it without
    // arithmetic.
    const A* rows[kPointers];
    DENSE_UNROLL for (int i = 0; i < kPointers; i++) rows[i] = at + 3 * i * a_row;
    const auto step = [&](int64_t offset, const A* bk) {
      Vector<A> bv[kVectors];
      DENSE_UNROLL for (int v = 0; v < kVectors; v++) bv[v] = load(bk + v * kLanes<A>);
      DENSE_UNROLL for (int r = 0; r < kRows; r++) {
        const A value = rows[r / 3][r % 3 * a_row + offset];
        DENSE_UNROLL for (int v = 0; v < kVectors; v++) acc[r][v] += value * bv[v];
      }
    };
    int64_t k = 0;
    if (a_depth == 1) {
      for (; k + kUnrolled <= depth; k += kUnrolled, bt += kUnrolled * b_depth) {
        DENSE_UNROLL for (int u = 0; u < kUnrolled; u++) step(u, bt + u * b_depth);
        DENSE_UNROLL for (int i = 0; i < kPointers; i++) rows[i] += kUnrolled;
      }
    }
    for (; k < depth; k++, bt += b_depth) {
      step(0, bt);
      DENSE_UNROLL for (int i = 0; i < kPointers; i++) rows[i] += a_depth;
    }
  }
  DENSE_UNROLL for (int r = 0; r < kRows; r++) {
    DENSE_UNROLL for (int v = 0; v < kVectors; v++) {
      A* out = c + r * p.c_row + v * kLanes<A>;
      store(out, p.accumulate ? acc[r][v] + load(out) : acc[r][v]);
    }
  }
}

template <class A>
using Kernel = void (*)(const Product<A>&, const A*, const A*, A*);

// kKernels<A, v>[r - 1] computes r rows and v vectors.
template <class A, int kVectors, int... kIndex>
constexpr std::array<Kernel<A>, kMaxRows> make_kernels(std::integer_sequence<int, kIndex...>) {
  return {product_kernel<A, kIndex + 1, kVectors>...};
}
template <class A, int kVectors>
constexpr std::array<Kernel<A>, kMaxRows> kKernels =
    make_kernels<A, kVectors>(std::make_integer_sequence<int, kMaxRows>{});

}  // namespace

template <class A>
void multiply(const Product<A>& p) {
  const int64_t groups = ceil_div(p.rows, kMaxRows);
  const int64_t steps = groups * ceil_div(p.columns, kPanel<A>);
  int64_t step = 0;
  for (int64_t j = 0; j < p.columns; j += kPanel<A>) {
    const auto& kernels = p.columns - j > kLanes<A> ? kKernels<A, 2> : kKernels<A, 1>;
    const A* b = p.b + j / kPanel<A> * p.b_panel;
    int64_t row = 0;
    for (int64_t g = 0; g < groups; g++) {  // their sizes differ by at most one
      const int64_t next = p.rows * (g + 1) / groups;
      for (const Prefetch& rows : p.prefetch) rows.fetch(step, steps);
      step++;
      kernels[next - row - 1](p, p.a + row * p.a_row, b, p.c + row * p.c_row + j);
      row = next;
    }
  }
}

template void multiply<float>(const Product<float>&);
template void multiply<double>(const Product<double>&);

}  // namespace dense_ext
