// What a convolution behind a frozen norm reads, one after another in memory: packed once for
// inference, or at every call.

#pragma once

#include <algorithm>
#include <cstdint>

#include "batch_norm.h"
#include "parallel.h"

namespace dense_ext {

// The vectors [C] of a norm that uses its running statistics.
template <class A>
struct FrozenNorm {
  const A *mean, *var, *weight, *bias;
  double eps;
};

// A norm's scale and shift, padded so that whole vectors can be loaded, and the packed weights.
template <class T>
struct Prepared {
  using A = Acc<T>;
  using E = Operand<T>;
  static_assert(sizeof(E) == sizeof(A));
  A *scale, *shift;
  E* packed;
  A* end;

  // Uses `memory` for a convolution from `in` to `out` channels with so many taps.
  Prepared(A* memory, int64_t in, int64_t out, int64_t taps = 1)
      : scale(memory),
        shift(scale + round_up(in, kPanel<A>)),
        packed(reinterpret_cast<E*>(shift + round_up(in, kPanel<A>))),
        end(reinterpret_cast<A*>(packed + taps * elements<E>(in) * round_up(out, kPanel<E>))) {}

  // In values of A.
  static int64_t size(int64_t in, int64_t out, int64_t taps = 1) {
    A start;
    return Prepared(&start, in, out, taps).end - &start;
  }

  void set_norm(const FrozenNorm<A>& norm, int64_t in) const {
    scale_and_shift(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, in, scale, shift);
    const int64_t padded = round_up(in, kPanel<A>);
    std::fill(scale + in, scale + padded, A{0});
    std::fill(shift + in, shift + padded, A{0});
  }
};

}  // namespace dense_ext
