// A thread's units of a tile in its registers, on their way from global to shared memory.

#pragma once

#include "tile.cuh"

namespace dense_ext {

// Loads the columns of a unit that are below `columns`, in accesses of `bytes` if not kWide.
template <bool kWide, class T>
__device__ __forceinline__ void load_unit(Bytes<16>& unit, const T* row, int column, int columns,
                                          int bytes) {
  if constexpr (kWide) {
    if (column < columns) unit = load_global(unit_at(row + column));
  } else {
    for_width<T>(bytes, [&](auto width) {
      using Part = Bytes<decltype(width)::value>;
      constexpr int kElements = static_cast<int>(sizeof(Part) / sizeof(T));
      DENSE_EXT_UNROLL for (int i = 0; i < static_cast<int>(16 / sizeof(Part)); i++) {
        const int c = column + i * kElements;
        if (c >= columns) continue;
        const Part part = load_global(reinterpret_cast<const Part*>(row + c));
        memcpy(reinterpret_cast<char*>(&unit) + i * sizeof(Part), &part, sizeof(Part));
      }
    });
  }
}

// A thread's units of a tile of kRows x kColumns elements, which kThreads threads share.
template <class T, int kRows, int kColumns, int kThreads>
struct ThreadUnits {
  using Place = Units<T, kColumns, kThreads>;
  static constexpr int kElements = Place::kElements, kAcross = Place::kAcross;
  static constexpr int kDown = kRows / Place::kRowsAtOnce;
  static_assert(kRows % Place::kRowsAtOnce == 0);

  Bytes<16> unit[kDown][kAcross] = {};

  // Calls body(unit, row, i, j) for each unit[i][j].
  template <class Body>
  __device__ __forceinline__ void for_each(int thread, const Body& body) {
    const Place place(thread);
    place.for_columns([&](int, int j) {
      place.template for_rows<kRows>([&](int r, int i) { body(unit[i][j], r, i, j); });
    });
  }

  // Makes all rows from `count` on zeros.
  __device__ __forceinline__ void clear(int count, int thread) {
    for_each(thread, [&](Bytes<16>& of, int r, int, int) {
      if (r >= count) of = {};
    });
  }

  // Loads the tile whose first row is row `first` of `rows`, except rows that do not exist and the
  // columns from `columns` on: there the units stay as they are.
  template <bool kWide, class U>
  __device__ __forceinline__ void load(const Rows<U>& rows, int first, int columns, int bytes,
                                       int thread) {
    const Place place(thread);
    place.for_columns([&](int c, int j) {
      place.template for_rows<kRows>([&](int r, int i) {
        if (first + r >= rows.count) return;
        load_unit<kWide>(unit[i][j], rows.at(first + r), c, columns, bytes);
      });
    });
  }

  template <class Layout>
  __device__ __forceinline__ void store(T* tile, Layout layout, int thread) const {
    const Place place(thread);
    place.for_columns([&](int c, int j) {
      place.template for_rows<kRows>(
          [&](int r, int i) { store_shared(unit_at(tile + offset_in(layout, r, c)), unit[i][j]); });
    });
  }

  // The floats of a UnitVector for the columns of a thread's units.
  struct Vector {
    float value[kAcross][kElements];

    __device__ __forceinline__ void load(const float* vector, int thread) {
      Place(thread).for_columns(
          [&](int c, int j) { UnitVector<T, kColumns>::load(value[j], vector, c); });
    }
  };
};

}  // namespace dense_ext
