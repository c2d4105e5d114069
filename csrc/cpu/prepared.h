// What a convolution behind a frozen norm reads, one after another in memory: packed once for
// inference, or at every call; and what operators that read packed weights have in common.

#pragma once

#include <torch/csrc/stable/ops.h>

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

// The widest panel of all instruction sets: dense_ext/backends/cpu.py computes sizes with it.
constexpr int64_t kWidestPanel = 32;

// A norm's scale and shift, padded so that whole vectors can be loaded, and the packed weights.
template <class T>
struct Prepared {
  using A = Acc<T>;
  using E = Operand<T>;
  static_assert(sizeof(E) == sizeof(A));
  static_assert(kWidestPanel % kPanel<A> == 0 && kWidestPanel % kPanel<E> == 0);
  A *scale, *shift;
  E* packed;
  A* end;

  // Uses `memory` for a convolution from `in` to `out` channels with so many taps.
  Prepared(A* memory, int64_t in, int64_t out, int64_t taps = 1)
      : scale(memory),
        shift(scale + round_up(in, kWidestPanel)),
        packed(reinterpret_cast<E*>(shift + round_up(in, kWidestPanel))),
        end(reinterpret_cast<A*>(packed + taps * elements<E>(in) * round_up(out, kWidestPanel))) {}

  // In values of A.
  static int64_t size(int64_t in, int64_t out, int64_t taps = 1) {
    A start;
    return Prepared(&start, in, out, taps).end - &start;
  }

  void set_norm(const FrozenNorm<A>& norm, int64_t in) const {
    scale_and_shift(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, in, scale, shift);
    const int64_t padded = round_up(in, kWidestPanel);
    std::fill(scale + in, scale + padded, A{0});
    std::fill(shift + in, shift + padded, A{0});
  }
};

// Memory for what several convolutions read. It begins with a number for the order of its weights,
// which differs between instruction sets: a compiled program may carry it to another machine.
template <class T>
class PackedMemory {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr A kOrder = kPanel<A> + 64 * kPanel<E> + 4096 * kIsPair<E>;

 public:
  // `size` is the sum of the sizes of what is Prepared in it.
  PackedMemory(const Tensor& packed, int64_t size)
      : begin_(channels<A>(packed, "packed", kWidestPanel + size)) {}

  A* to_write() const {
    std::fill_n(begin_, kWidestPanel, A{0});
    *begin_ = kOrder;
    return begin_ + kWidestPanel;
  }

  A* to_read() const {
    STD_TORCH_CHECK(*begin_ == kOrder,
                    "these weights were packed for other CPU instructions than this process uses: "
                    "pack them again, or compile the program again, on this machine");
    return begin_ + kWidestPanel;
  }

 private:
  A* const begin_;
};

// A view of x [N, C, H, W] as [N, H, W, C], or of [N, C, D, H, W] as [N, D, H, W, C].
inline Tensor nhwc(Tensor x) {
  for (int64_t d = 1; d + 1 < x.dim(); d++) x = torch::stable::transpose(x, d, d + 1);
  return x;
}

// The inverse.
inline Tensor nchw(Tensor x) {
  for (int64_t d = x.dim() - 1; d > 1; d--) x = torch::stable::transpose(x, d, d - 1);
  return x;
}

}  // namespace dense_ext
