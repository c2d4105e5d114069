// What the two 1x1 convolutions share: the split of a backward over threads, and the weight
// gradient's last step.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "reduce.h"
#include "tensor.h"

namespace dense_ext {

constexpr int64_t kOneTap[1] = {0};

// Of rows of scratch. A vector more than needed keeps the rows off the same cache sets.
template <class A>
int64_t leading_dimension(int64_t columns) {
  return round_up(columns, kLanes<A>) + kLanes<A>;
}

// Threads split the pixels and, where there are few of those, the channels too: a part of the
// pixels costs a private weight gradient to fill and add, a part of the channels its own dz.
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

// grad[o][i] = sum over parts of partial[part][o][i], rows `ld` apart
template <class T>
void write_grad_weight(Acc<T>* partial, int64_t parts, int64_t ld, const Weight<T>& grad) {
  const int64_t threads = std::min(num_threads(), grad.out);
  parallel(threads, [&](int64_t thread) {
    const Range rows = part_of(grad.out, threads, thread);
    add_parts(partial, parts, grad.out * ld, {rows.begin * ld, rows.end * ld});
    for (int64_t o = rows.begin; o < rows.end; o++) {
      const Acc<T>* source = partial + o * ld;
      T* target = grad.data + o * grad.out_stride;
      if (grad.in_stride == 1) {
        store_rows(source, ld, 1, grad.in, target, 0);
      } else {
        for (int64_t i = 0; i < grad.in; i++) {
          target[i * grad.in_stride] = static_cast<T>(source[i]);
        }
      }
    }
  });
}

}  // namespace dense_ext
