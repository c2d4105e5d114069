// Tiles in shared memory: copying rows of a matrix there and back by a whole block, and the moments
// of a tile's columns.

#pragma once

#include "tensor.cuh"

namespace dense_ext {

// Rows of 64 bytes are padded to 80 bytes. Neighbouring rows then share banks, but a row and the
// fourth after it do not. So threads take each eight rows in this order.
__device__ __forceinline__ int spread(int row) { return row / 8 * 8 + row % 2 * 4 + row % 8 / 2; }

// A thread's first access to a tile whose rows take kUnits accesses of 16 bytes.
template <int kUnits>
__device__ __forceinline__ int first_access() {
  const int i = thread_index();
  return kUnits == 4 ? spread(i / kUnits) * kUnits + i % kUnits : i;
}

// Calls body(row, column, valid) for each access of kBytes to the first `rows` rows of a tile of
// kRows x kColumns; an access is valid if its column is below `columns`.
template <class T, int kBytes, int kRows, int kColumns, int kThreads, class Body>
__device__ __forceinline__ void for_accesses(int rows, int columns, const Body& body) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T)), kUnits = kColumns / kElements;
  static_assert(kUnits != 4 || kRows % 8 == 0);
  // Not unrolled: the addresses of several accesses would take registers that the products need.
  DENSE_EXT_NO_UNROLL for (int i = first_access<kUnits>(); i < rows * kUnits; i += kThreads) {
    const int column = i % kUnits * kElements;
    body(i / kUnits, column, column < columns);
  }
}

// Calls body(Width<n>{}) with the bytes an access may move: `bytes`, or one element if that is less
// than 4.
template <int kBytes>
struct Width {
  static constexpr int value = kBytes;
};
template <class T, class Body>
__device__ __forceinline__ void for_width(int bytes, const Body& body) {
  if (bytes == 16) {
    body(Width<16>{});
  } else if (bytes == 8) {
    body(Width<8>{});
  } else if (bytes == 4) {
    body(Width<4>{});
  } else {
    body(Width<sizeof(T)>{});
  }
}

// Consecutive rows, of which the first `count` exist. 32-bit distances save registers.
template <class T>
struct Rows {
  T* data;
  int stride, count;

  // The rows are the pixels from `first` on; their elements are the channels from `channel` on.
  __device__ Rows(const Pixels<T>& p, int64_t first, int count, int64_t channel)
      : data(p.at(first) + channel), stride(static_cast<int>(p.stride)), count(count) {}
  __device__ T* operator()(int r) const { return r < count ? data + int64_t{r} * stride : nullptr; }
};

// Copies a tile into shared memory, asynchronously except for single 16-bit elements. `row(r)` is
// the address of row r's first element in global memory. Columns from `columns` on, and rows whose
// address is null, become zeros. Rows from `rows` on are not written.
template <int kRows, int kColumns, int kThreads, class T, class Row>
__device__ __forceinline__ void copy_tile(T* tile, int ld, int columns, int bytes, const Row& row,
                                          int rows = kRows) {
  for_width<T>(bytes, [&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    for_accesses<T, kBytes, kRows, kColumns, kThreads>(
        rows, columns, [&](int r, int c, bool valid) {
          const T* from = row(r);
          valid = valid && from;
          if constexpr (kBytes >= 4) {
            copy_async<kBytes>(tile + r * ld + c, valid ? from + c : from, valid);
          } else {
            store_shared(tile + r * ld + c, valid ? load_global(from + c) : T{0});
          }
        });
  });
}

// Writes the columns below `columns` of a tile's rows to global memory, except rows whose address
// is null.
template <int kRows, int kColumns, int kThreads, class T, class Row>
__device__ __forceinline__ void store_tile(const T* tile, int ld, int columns, int bytes,
                                           const Row& row) {
  for_width<T>(bytes, [&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    using V = Bytes<kBytes>;
    for_accesses<T, kBytes, kRows, kColumns, kThreads>(
        kRows, columns, [&](int r, int c, bool valid) {
          T* to = row(r);
          if (!valid || !to) return;
          store_global(reinterpret_cast<V*>(to + c),
                       load_shared(reinterpret_cast<const V*>(tile + r * ld + c)));
        });
  });
}

// Calls compute(step) for each step when load(step)'s copies have arrived in shared memory. Copies
// for the next steps are in flight meanwhile; step s uses stage s % kStages. At the end the stages'
// memory is free.
template <int kStages, class Load, class Compute>
__device__ __forceinline__ void pipeline(int64_t steps, const Load& load, const Compute& compute) {
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) load(step);
    copy_async_commit();
  }
  for (int64_t step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    sync_threads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    copy_async_commit();
    compute(step);
  }
  copy_async_wait<0>();
  sync_threads();
}

// Stores and loads two neighbouring values of a tile, stored as T.
template <class T>
__device__ __forceinline__ void store_pair(T* at, float x, float y) {
  if constexpr (sizeof(T) == 2) {
    store_shared(reinterpret_cast<uint32_t*>(at), pack<T>(x, y));
  } else {
    store_shared(reinterpret_cast<Bytes<8>*>(at), Bytes<8>{{bits_of(x), bits_of(y)}});
  }
}
template <class T>
__device__ __forceinline__ Float2 load_pair(const T* at) {
  if constexpr (sizeof(T) == 2) {
    return unpack<T>(load_shared(reinterpret_cast<const uint32_t*>(at)));
  } else {
    const auto pair = load_shared(reinterpret_cast<const Bytes<8>*>(at));
    return {float_of_bits(pair.data[0]), float_of_bits(pair.data[1])};
  }
}

// Applies relu(scale*x + shift) in place, rounded to T, to the rows of a tile for which `valid(r)`.
template <int kColumns, int kThreads, class T, class Valid>
__device__ __forceinline__ void activate_rows(T* tile, int ld, int rows, const float* scale,
                                              const float* shift, const Valid& valid) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kUnits = kColumns / kElements;
  // A thread has the same columns in all its rows.
  static_assert(kThreads % kUnits == 0);
  const int column = thread_index() % kUnits * kElements;
  float s[kElements], t[kElements];
  DENSE_EXT_UNROLL for (int e = 0; e < kElements; e++) {
    s[e] = load_shared(scale + column + e);
    t[e] = load_shared(shift + column + e);
  }
  DENSE_EXT_NO_UNROLL for (int i = first_access<kUnits>(); i < rows * kUnits; i += kThreads) {
    if (!valid(i / kUnits)) continue;
    auto* const at = reinterpret_cast<Bytes<16>*>(tile + i / kUnits * ld + column);
    Bytes<16> x = load_shared(at);
    DENSE_EXT_UNROLL for (int w = 0; w < 4; w++) {
      if constexpr (sizeof(T) == 2) {
        const Float2 pair = unpack<T>(x.data[w]);
        x.data[w] =
            pack_relu<T>(pair.x * s[2 * w] + t[2 * w], pair.y * s[2 * w + 1] + t[2 * w + 1]);
      } else {
        x.data[w] = bits_of(relu(float_of_bits(x.data[w]) * s[w] + t[w]));
      }
    }
    store_shared(at, x);
  }
}

// Copies kCount values of a vector, from `first` on, into shared memory. Beyond the vector's end,
// at `count`, it writes zeros.
template <int kCount, int kThreads>
__device__ __forceinline__ void copy_vector(float* shared, const float* vector, int64_t first,
                                            int64_t count) {
  for (int i = thread_index(); i < kCount; i += kThreads) {
    const bool valid = first + i < count;
    copy_async<4>(shared + i, valid ? vector + first + i : vector, valid);
  }
}

// The mean and the sum of squared deviations (m2) of `count` values, merged as in Chan, Golub and
// LeVeque (1979).
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float together = count + other.count, delta = other.mean - mean;
    const float fraction = other.count / together;
    mean += delta * fraction;
    m2 += other.m2 + delta * delta * (count * fraction);
    count = together;
  }
};

// The moments of a tile's columns, over all tiles of a block.
template <class T, int kColumns, int kThreads>
class ColumnMoments {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int kWords = kColumns / kPerWord, kGroups = kThreads / kWords;
  static_assert(kColumns <= kThreads);

 public:
  static constexpr int kScratch = kGroups * (2 * kColumns + 1);  // in floats

  __device__ explicit ColumnMoments(float* scratch) : scratch_(scratch) {}

  // Adds the rows of a tile for which `valid(r)`. All threads of the block must call it. The tile
  // and the scratch are in use until the block's next barrier.
  template <int kRows, class Valid>
  __device__ void add(const T* tile, int ld, const Valid& valid) {
    const int word = thread_index() % kWords, group = thread_index() / kWords;
    const T* column = tile + word * kPerWord;
    const int rows = group < kGroups ? kRows : 0;  // leftover threads do nothing
    const int first = kWords == 16 ? spread(group) : group;
    int count = 0;
    float mean[kPerWord] = {}, m2[kPerWord] = {};
    for (int r = first; r < rows; r += kGroups) {
      if (!valid(r)) continue;
      count++;
      const Word x(column + r * ld);
      DENSE_EXT_UNROLL for (int i = 0; i < kPerWord; i++) mean[i] += x.value[i];
    }
    DENSE_EXT_UNROLL for (int i = 0; i < kPerWord; i++) mean[i] /= static_cast<float>(count);
    for (int r = first; r < rows; r += kGroups) {
      if (!valid(r)) continue;
      const Word x(column + r * ld);
      DENSE_EXT_UNROLL for (int i = 0; i < kPerWord; i++) {
        m2[i] += (x.value[i] - mean[i]) * (x.value[i] - mean[i]);
      }
    }
    if (group < kGroups) {
      float* means = scratch_ + group * kColumns + word * kPerWord;
      DENSE_EXT_UNROLL for (int i = 0; i < kPerWord; i++) {
        means[i] = mean[i];
        means[kGroups * kColumns + i] = m2[i];
      }
      if (word == 0) scratch_[2 * kGroups * kColumns + group] = static_cast<float>(count);
    }
    sync_threads();
    if (thread_index() >= kColumns) return;
    for (int g = 0; g < kGroups; g++) {
      const float* of = scratch_ + g * kColumns + thread_index();
      total_.merge({scratch_[2 * kGroups * kColumns + g], of[0], of[kGroups * kColumns]});
    }
  }

  // Writes the moments of `columns` columns to a row [count, means, m2]. Each of the two vectors
  // has `size` elements, and this block's columns begin at `first`.
  __device__ void write(float* row, int64_t first, int64_t size, int columns) const {
    if (thread_index() >= columns) return;
    if (first == 0 && thread_index() == 0) store_global(row, total_.count);
    store_global(row + 1 + first + thread_index(), total_.mean);
    store_global(row + 1 + size + first + thread_index(), total_.m2);
  }

 private:
  struct Word {
    float value[kPerWord];
    __device__ explicit Word(const T* at) {
      if constexpr (kPerWord == 2) {
        const Float2 x = unpack<T>(load_shared(reinterpret_cast<const uint32_t*>(at)));
        value[0] = x.x, value[1] = x.y;
      } else {
        value[0] = load_shared(at);
      }
    }
  };

  float* scratch_;
  Moments total_;  // of column thread_index()
};

}  // namespace dense_ext
