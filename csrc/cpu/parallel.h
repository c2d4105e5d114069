// Splitting work over threads, and the scratch memory for it.
//
// The split depends only on the sizes and the number of threads. Every thread sums its part in
// order, and the threads' sums are added in order. So equal inputs give equal bits, without
// atomics.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>

#include "gemm.h"

namespace dense_ext {

// Calls body(i) for i in [0, count), on `count` threads.
template <class Body>
void parallel(int64_t count, const Body& body) {
  if (count == 1) return body(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Splits `total` items into tiles of at most `size`. If there are enough items, the number of tiles
// is a multiple of the threads.
struct Tiles {
  int64_t total, count, parts;

  Tiles(int64_t total_, int64_t size, int64_t threads)
      : total(total_),
        count(std::min(total_, round_up(ceil_div(total_, size), threads))),
        parts(std::min(count, threads)) {}
  Range of_part(int64_t part) const { return part_of(count, parts, part); }
  Range tile(int64_t i) const { return part_of(total, count, i); }
};

// Splits channels into chunks of near-equal size, a multiple of a panel of the matrix product.
struct Chunks {
  int64_t total, size, count;

  Chunks(int64_t total_, int64_t max_size, int64_t panel)
      : total(total_),
        size(round_up(ceil_div(total_, ceil_div(total_, max_size)), panel)),
        count(ceil_div(total_, size)) {}
  Range operator[](int64_t i) const { return {i * size, std::min(total, (i + 1) * size)}; }
};

// Splits a product over threads by tiles of its rows, or if there are few rows by its columns too.
// Then each thread reads the weights of its columns alone. A part is on one thread.
template <class E>
struct ProductParts {
  int64_t columns, panels = ceil_div(columns, kPanel<E>);
  int64_t column_parts;
  Tiles tiles;

  ProductParts(int64_t rows, int64_t tile_rows, int64_t columns_, int64_t threads)
      : columns(columns_),
        column_parts(rows <= threads * kMaxRows<E> ? std::min(threads, panels) : 1),
        tiles(rows, tile_rows, threads / column_parts) {}
  int64_t count() const { return tiles.parts * column_parts; }
  Range tiles_of(int64_t part) const { return tiles.of_part(part / column_parts); }
  // Begins with a whole panel.
  Range columns_of(int64_t part) const {
    const Range of = part_of(panels, column_parts, part % column_parts);
    return {of.begin * kPanel<E>, std::min(of.end * kPanel<E>, columns)};
  }
};

// The purposes of a thread's scratch buffers. The buffers live as long as the thread and only grow,
// so that a tile stays in the same, cached memory from call to call.
enum class Slot {
  kActivation,
  kProduct,
  kGradient,
  kPairs,
  kStatistics,
  kLines,
  kPoints,
  kPointProducts,
  kTilesOfA,
  kTilesOfB,
  kCount
};

inline void* scratch_bytes(Slot slot, int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    int64_t bytes = 0;
  };
  static thread_local std::array<Buffer, static_cast<int>(Slot::kCount)> buffers;
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    buffer.data.reset(std::aligned_alloc(64, round_up(bytes, 64)));
    buffer.bytes = buffer.data ? bytes : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data.get();
}

template <class A>
A* scratch(Slot slot, int64_t count) {
  return static_cast<A*>(scratch_bytes(slot, count * int64_t{sizeof(A)}));
}

// Memory for the operand whose depth is the rows, in `count` pairs. It is the one whose depth is
// the columns if elements are not pairs, since then both are the same.
template <class E>
E* rows_operand(E* columns_operand, int64_t count) {
  if constexpr (kIsPair<E>) return scratch<E>(Slot::kPairs, count);
  return columns_operand;
}

// The bytes that `count` values take in a Workspace, where every piece is aligned.
template <class U>
int64_t bytes_of(int64_t count) {
  constexpr int64_t kAlignment = 64;
  return round_up(count * int64_t{sizeof(U)}, kAlignment);
}
// The bytes of a vector padded to whole panels.
template <class A>
int64_t padded_bytes(int64_t channels) {
  return bytes_of<A>(round_up(channels, kPanel<A>));
}

// One allocation from PyTorch for the memory that all threads of a call share: packed weights,
// padded per-channel vectors and partial sums.
class Workspace {
 public:
  // `bytes` are the sizes of the pieces that will be taken.
  explicit Workspace(std::initializer_list<int64_t> bytes) {
    constexpr int64_t kAlignment = 64;
    const int64_t total = std::accumulate(bytes.begin(), bytes.end(), kAlignment);
    tensor_ = torch::stable::empty({total}, torch::headeronly::ScalarType::Byte);
    const auto address = reinterpret_cast<int64_t>(tensor_.mutable_data_ptr());
    next_ = reinterpret_cast<char*>(round_up(address, kAlignment));
    end_ = reinterpret_cast<char*>(address + total);
  }

  // Takes memory for the next `count` values.
  template <class U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(next_);
    next_ += bytes_of<U>(count);
    STD_TORCH_CHECK(next_ <= end_, "more is taken from a workspace than it was made for");
    return piece;
  }

  // Takes a copy of values[count], zero padded to whole panels, so that whole vectors can be
  // loaded.
  template <class A>
  const A* take_padded(const A* values, int64_t count) {
    const int64_t padded = round_up(count, kPanel<A>);
    A* copy = take<A>(padded);
    std::copy(values, values + count, copy);
    std::fill(copy + count, copy + padded, A{0});
    return copy;
  }

 private:
  torch::stable::Tensor tensor_;
  char *next_, *end_;
};

template <class T>
struct Packing {
  WeightsAsB<T> weights;
  Operand<T>* packed;
};

// Packs several weights in one parallel loop.
template <class T>
void pack_weights(std::initializer_list<Packing<T>> all) {
  constexpr int64_t kRows = 64;
  const auto items = [](const Packing<T>& p) {
    return p.weights.panels() * ceil_div(p.weights.depth, kRows);
  };
  int64_t total = 0;
  for (const Packing<T>& each : all) total += items(each);
  const int64_t parts = std::min(total, num_threads());
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(total, parts, part);
    int64_t first = 0;
    for (const Packing<T>& each : all) {
      const int64_t chunks = ceil_div(each.weights.depth, kRows), last = first + items(each);
      for (int64_t i = std::max(range.begin, first); i < std::min(range.end, last); i++) {
        const int64_t panel = (i - first) / chunks, row = (i - first) % chunks * kRows;
        pack_rows(each.weights, panel, {row, std::min(row + kRows, each.weights.depth)},
                  each.packed);
      }
      first = last;
    }
  });
}

template <class T>
void pack_weights(const WeightsAsB<T>& weights, Operand<T>* packed) {
  pack_weights<T>({{weights, packed}});
}

}  // namespace dense_ext
