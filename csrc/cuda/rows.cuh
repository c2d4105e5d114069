// Rows of a matrix in global memory, and the tiles of pixels in which kernels go through them.

#pragma once

#include <cstdint>
#include <type_traits>

#include "tensor.cuh"

namespace dense_ext {

// A row of a matrix in global memory. If it does not exist, its address is never followed.
template <class T>
struct Row {
  T* data;
  bool exists;
};

// Rows at equal distances, of which the first `count` exist. The distance is a 32-bit number of
// bytes, so that a row's address takes one instruction.
template <class T>
struct Rows {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  T* data;
  uint32_t stride;
  int count;

  __device__ __forceinline__ Rows(T* data, int64_t stride, int count)
      : data(data), stride(static_cast<uint32_t>(stride) * uint32_t{sizeof(T)}), count(count) {}
  // The rows are the pixels from `first` on; their elements are the channels from `channel` on.
  __device__ __forceinline__ Rows(const Pixels<T>& p, int64_t first, int count, int64_t channel)
      : Rows(p.at(first) + channel, p.stride, count) {}

  __device__ __forceinline__ Row<T> operator()(int r) const { return {at(r), r < count}; }
  __device__ __forceinline__ T* at(int r) const {
    const uint64_t distance = uint64_t{static_cast<uint32_t>(r)} * stride;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + distance);
  }
  // The rows with the columns from `column` on.
  __device__ __forceinline__ Rows from(int column) const {
    Rows rows = *this;
    rows.data += column;
    return rows;
  }
};

// Rows in any order: row r is row numbers(r) of `all`, and does not exist if that is negative.
template <class T, class Numbers>
struct ChosenRows {
  Rows<T> all;
  Numbers numbers;

  __device__ __forceinline__ ChosenRows(const Rows<T>& all, const Numbers& numbers)
      : all(all), numbers(numbers) {}
  __device__ __forceinline__ Row<T> operator()(int r) const {
    const int number = numbers(r);
    return {all.at(number), number >= 0};
  }
};

// Pixels in tiles of kPixels, with the channels from `channel` on.
template <int kPixels, class T>
struct Tiles {
  Rows<T> all;

  __device__ __forceinline__ Tiles(const Pixels<T>& p, int64_t channel)
      : all(p.data + channel, p.stride, 0) {}
  // The rows of a tile, of which the first `count` exist.
  __device__ __forceinline__ Rows<T> operator()(int tile, int count) const {
    Rows<T> rows = all;
    const uint64_t distance = uint64_t{static_cast<uint32_t>(tile)} * all.stride * kPixels;
    rows.data =
        reinterpret_cast<T*>(reinterpret_cast<typename Rows<T>::Byte*>(all.data) + distance);
    rows.count = count;
    return rows;
  }
};

}  // namespace dense_ext
