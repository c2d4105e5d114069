// Shared by the two 1x1 convolutions: splitting a backward over threads, and the final reduction of
// the weight gradient.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "reduce.h"
#include "rows.h"
#include "tensor.h"

namespace dense_ext {

constexpr int64_t kOneTap[1] = {0};

// A 1x1 weight [out, in] as the b of a product whose depth is `out`, or if transposed `in`.
template <class T>
WeightsAsB<T> weights_as_b(const Weight<const T>& w, bool transposed) {
  return {.weights = w.data,
          .taps = 1,
          .depth = transposed ? w.in : w.out,
          .columns = transposed ? w.out : w.in,
          .k_stride = transposed ? w.in_stride : w.out_stride,
          .j_stride = transposed ? w.out_stride : w.in_stride,
          .tap_offsets = kOneTap};
}

// The distance between rows of scratch, in elements. One vector more than needed keeps rows out of
// the same cache sets.
template <class E>
int64_t leading_dimension(int64_t row) {
  return round_up(row, kLanes<E>) + kLanes<E>;
}

// The products of forward's 1x1 convolution, for the tiles of one thread.
template <class T>
struct ActivatedProduct {
  using A = Acc<T>;
  using E = Operand<T>;
  // The pixels of a tile (8 register tiles), and the channels that are activated at a time.
  static constexpr int64_t kPixels = 112;
  static constexpr int64_t kChannels = 256;

  Pixels<const T> x;       // [M, C]
  const A *scale, *shift;  // [C], padded
  const E* packed;         // the weight [B, C], from pack_weights
  int64_t out;             // B
  Chunks chunks = {x.channels, kChannels, kPanel<E>};

  int64_t ld() const { return leading_dimension<A>(out); }

  // z = relu(scale*x + shift) @ W^T for the pixels of `tile`, in scratch with rows of ld().
  // Meanwhile prefetches the first input of the tile `next`, and `target`, to which z will be
  // written.
  A* run(Range tile, Range next, Prefetch target) const {
    const int64_t a_ld = leading_dimension<E>(elements<E>(chunks.size));
    E* a = scratch<E>(Slot::kActivation, kPixels * a_ld);
    A* z = scratch<A>(Slot::kProduct, kPixels * ld());
    for (int64_t c = 0; c < chunks.count; c++) {
      const int64_t first = chunks[c].begin, columns = chunks[c].size();
      const bool last = c + 1 == chunks.count;
      activate_rows<Depth::kColumns>(x.at(tile.begin) + first, x.stride, tile.size(), columns,
                                     scale + first, shift + first, a, a_ld);
      multiply(Product<E>{
          .rows = tile.size(),
          .columns = out,
          .depth = elements<E>(columns),
          .a = a,
          .a_row = a_ld,
          .a_depth = 1,
          .b = packed + elements<E>(first) * kPanel<E>,
          .b_panel = elements<E>(x.channels) * kPanel<E>,
          .b_depth = kPanel<E>,
          .c = z,
          .c_row = ld(),
          .accumulate = c > 0,
          .prefetch = {fetch_pixels(x, last ? next : tile, chunks[last ? 0 : c + 1]), target}});
    }
    return z;
  }
};

// How threads split the work: over the pixels and, if there are few pixels, over the channels too.
// Each part of the pixels costs a private weight gradient, which must be filled and added. Each
// part of the channels costs forming dz again.
struct Grid {
  int64_t pixel_parts, channel_parts = 1;

  Grid(int64_t pixels, int64_t channels, int64_t chunks, int64_t threads)
      : pixel_parts(std::min(threads, pixels)) {
    int64_t least = pixels + 2 * channels * pixel_parts;
    for (int64_t parts = 2; parts <= std::min(threads, chunks); parts++) {
      const int64_t others = std::min(pixels, threads / parts);
      const int64_t cost = pixels * parts + 2 * channels * others;
      if (threads % parts == 0 && cost < least) {
        least = cost;
        pixel_parts = others;
        channel_parts = parts;
      }
    }
  }
  int64_t count() const { return pixel_parts * channel_parts; }
};

// The private weight gradients [out][in] of the parts, in a workspace. Their rows are ld() apart.
template <class T>
class Conv1x1WeightGradient {
  using A = Acc<T>;

 public:
  // If `grad` has no data, the gradient is not wanted and takes no memory.
  Conv1x1WeightGradient(const Weight<T>& grad, int64_t parts) : grad_(grad), parts_(parts) {}

  bool wanted() const { return grad_.data != nullptr; }
  int64_t ld() const { return round_up(grad_.in, kPanel<A>); }
  int64_t bytes() const { return bytes_of<A>(parts_ * size()); }
  void take(Workspace& workspace) { partial_ = workspace.take<A>(parts_ * size()); }
  A* part(int64_t i) { return partial_ + i * size(); }

  // grad[o][i] = sum over parts of part[o][i]
  void finish() {
    const int64_t threads = std::min(num_threads(), grad_.out);
    parallel(threads, [&](int64_t thread) {
      const Range rows = part_of(grad_.out, threads, thread);
      add_parts(partial_, parts_, size(), {rows.begin * ld(), rows.end * ld()});
      for (int64_t o = rows.begin; o < rows.end; o++) write_row(o);
    });
  }

 private:
  int64_t size() const { return wanted() ? grad_.out * ld() : 0; }

  void write_row(int64_t o) {
    const A* source = partial_ + o * ld();
    T* target = grad_.data + o * grad_.out_stride;
    if (grad_.in_stride == 1) {
      store_rows(source, ld(), 1, grad_.in, target, 0);
    } else {
      for (int64_t i = 0; i < grad_.in; i++) {
        target[i * grad_.in_stride] = static_cast<T>(source[i]);
      }
    }
  }

  const Weight<T> grad_;
  const int64_t parts_;
  A* partial_ = nullptr;
};

}  // namespace dense_ext
