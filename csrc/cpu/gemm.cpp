// C = A B over a register tile of up to 14 rows and 2 vectors of columns (see gemm.h for strides).
//
// In each depth step, 2 vector loads of b and one broadcast of a per row feed 28 independent
// multiply-adds. So the tile runs at the arithmetic peak as long as b's panel streams from L1 or
// L2.

#include "gemm.h"

#include <array>
#include <utility>

#include "amx.h"
#include "neon.h"

namespace dense_ext {
namespace {

constexpr int64_t kNoOffset = 0;
// The depth steps of an iteration, if a is dense along the depth.
constexpr int kUnrolled = 4;

template <class E, int kRows, int kVectors>
void product_kernel(const Product<E>& p, const E* a, const E* b, Acc<E>* c) {
  constexpr int kPointers = (kRows + 2) / 3;
  Vector<Acc<E>> acc[kRows][kVectors] = {};
  const int64_t a_row = p.a_row, a_depth = p.a_depth, b_depth = p.b_depth, depth = p.depth;
  for (int64_t tap = 0; tap < p.taps; tap++) {
    const E* at = a + (p.a_taps ? p.a_taps[tap] : kNoOffset);
    const E* bt = b + (p.b_taps ? p.b_taps[tap] : kNoOffset);
    // A pointer for each three rows: an address reaches 0, 1 or 2 strides from it without
    // arithmetic.
    const E* rows[kPointers];
    DENSE_UNROLL for (int i = 0; i < kPointers; i++) rows[i] = at + 3 * i * a_row;
    const auto step = [&](int64_t offset, const E* bk) {
      Vector<E> bv[kVectors];
      DENSE_UNROLL for (int v = 0; v < kVectors; v++) bv[v] = load(bk + v * kLanes<E>);
      DENSE_UNROLL for (int r = 0; r < kRows; r++) {
        const E value = rows[r / 3][r % 3 * a_row + offset];
        DENSE_UNROLL for (int v = 0; v < kVectors; v++) {
          acc[r][v] = multiply_add(acc[r][v], value, bv[v]);
        }
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
      Acc<E>* out = c + r * p.c_row + v * kLanes<E>;
      store(out, p.accumulate ? acc[r][v] + load(out) : acc[r][v]);
    }
  }
}

template <class E>
using Kernel = void (*)(const Product<E>&, const E*, const E*, Acc<E>*);

template <class E, int kRows, int kVectors>
constexpr Kernel<E> kernel_of() {
  if constexpr (kIsPair<E> && kNeonPairs) {
    return neon::product_kernel<kRows, kVectors>;
  } else {
    return product_kernel<E, kRows, kVectors>;
  }
}

// kKernels<E, v>[r - 1] computes r rows and v vectors.
template <class E, int kVectors, int... kIndex>
constexpr std::array<Kernel<E>, kMaxRows<E>> make_kernels(std::integer_sequence<int, kIndex...>) {
  return {kernel_of<E, kIndex + 1, kVectors>()...};
}
template <class E, int kVectors>
constexpr std::array<Kernel<E>, kMaxRows<E>> kKernels =
    make_kernels<E, kVectors>(std::make_integer_sequence<int, kMaxRows<E>>{});

}  // namespace

template <class E>
void multiply(const Product<E>& p) {
#if defined(DENSE_EXT_AMX)
  if constexpr (kIsPair<E>) {
    if (amx::is_here()) return amx::multiply(p);
  }
#endif
  const int64_t groups = ceil_div(p.rows, kMaxRows<E>);
  const int64_t steps = groups * ceil_div(p.columns, kPanel<E>);
  int64_t step = 0;
  for (int64_t j = 0; j < p.columns; j += kPanel<E>) {
    const auto& kernels = p.columns - j > kLanes<E> ? kKernels<E, 2> : kKernels<E, 1>;
    const E* b = p.b + j / kPanel<E> * p.b_panel;
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
#if defined(DENSE_EXT_PAIRS)
template void multiply<Pair>(const Product<Pair>&);
#endif

}  // namespace dense_ext
