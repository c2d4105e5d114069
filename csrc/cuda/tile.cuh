// Tiles in shared memory: copying rows of a matrix there and back by a whole block, and batch norm
// and ReLU in place.
//
// A unit is 16 bytes of a row: what a thread loads or stores in one access. A kernel is wide if all
// its accesses to global memory may be of 16 bytes; kWide is its template argument.

#pragma once

#include <limits>
#include <type_traits>

#include "rows.cuh"
#include "vector.cuh"

namespace dense_ext {

// Where the elements of a tile lie, so that eight rows at one column are in different banks.
//
// For 16-bit types, unit u of row r lies at u ^ (r % 8). Rows then need no padding, and the two
// units of each 32 bytes stay together: a copy that splits them takes more passes. float's
// fragments are loaded by the element, for which such addresses take too many instructions. Its
// rows are padded.
template <class T, int kColumns>
struct TileLayout {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr bool kSwizzled = sizeof(T) == 2;
  static constexpr int kLd = kSwizzled ? kColumns : kColumns + kElements;
  static_assert(!kSwizzled || kColumns % (8 * kElements) == 0);
  int first = 0;  // the tile's column that is column 0
};
// An element's offset in a tile, whose layout may also be the distance between its rows.
__device__ __forceinline__ int offset_in(int ld, int row, int column) { return row * ld + column; }
template <class T, int kColumns>
__device__ __forceinline__ int offset_in(const TileLayout<T, kColumns>& layout, int row,
                                         int column) {
  using Layout = TileLayout<T, kColumns>;
  const int swizzle = Layout::kSwizzled ? (row & 7) * Layout::kElements : 0;
  return row * Layout::kLd + ((layout.first + column) ^ swizzle);
}

// Rows of 64 bytes are padded to 80 bytes. Neighbouring rows then share banks, but a row and the
// fourth after it do not. So threads take each eight rows in this order.
__device__ __forceinline__ int spread(int row) { return row / 8 * 8 + row % 2 * 4 + row % 8 / 2; }

// A thread's first access to a tile whose rows take kUnits accesses of 16 bytes.
template <int kUnits>
__device__ __forceinline__ int first_access(int i = thread_index()) {
  return kUnits == 4 ? spread(i / kUnits) * kUnits + i % kUnits : i;
}

// Calls body(row, column, valid) for each access of kBytes to a tile of kRows x kColumns; an access
// is valid if its column is below `columns`.
template <class T, int kBytes, int kRows, int kColumns, int kThreads, class Body>
__device__ __forceinline__ void for_accesses(int columns, const Body& body,
                                             int thread = thread_index()) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T)), kUnits = kColumns / kElements;
  static_assert(kUnits != 4 || kRows % 8 == 0);
  // Not unrolled: the addresses of several accesses would take registers that the products need.
  DENSE_EXT_NO_UNROLL for (int i = first_access<kUnits>(thread); i < kRows * kUnits;
                           i += kThreads) {
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

// Calls body(std::true_type{}) if all accesses to global memory may be of 16 bytes, and
// body(std::false_type{}) otherwise. A kernel is compiled for both; the second one finds out at
// each copy how many bytes an access may have.
template <class Body>
void with_width(int bytes, const Body& body) {
  if (bytes == 16) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// The units of a tile that belong to one thread: kAcross units in every kRowsAtOnce-th row. kSide
// threads have neighbouring units of a row. If these are less than 128 bytes, threads take the rows
// in an order in which the units of eight threads lie in different banks.
template <class T, int kColumns, int kThreads>
struct Units {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kUnits = kColumns / kElements;
  static constexpr int kSide = kUnits % 16 == 0  ? 16
                               : kUnits % 8 == 0 ? 8
                               : kUnits % 4 == 0 ? 4
                                                 : 2;
  static constexpr int kAcross = kUnits / kSide, kRowsAtOnce = kThreads / kSide;
  static constexpr int kStep = kSide * kElements;  // columns from a unit to the next
  static_assert(kUnits % kSide == 0 && kThreads % kSide == 0);
  static_assert(kSide >= 8 || kRowsAtOnce % 8 == 0);
  int row, column;

  __device__ explicit Units(int thread = thread_index())
      : row(thread / kSide), column(thread % kSide * kElements) {
    if (kSide == 4) row = spread(row);
    if (kSide == 2) row = row / 8 * 8 + row % 4 * 2 + row / 4 % 2;
  }

  // Calls body(row, index) for the thread's rows among kRows rows.
  template <int kRows, class Body>
  __device__ __forceinline__ void for_rows(const Body& body) const {
    DENSE_EXT_UNROLL for (int i = 0; i * kRowsAtOnce < kRows; i++) {
      const int r = row + i * kRowsAtOnce;
      if (kRows % kRowsAtOnce == 0 || r < kRows) body(r, i);
    }
  }
  // The same for kBatch rows at a time: calls load(row, n) for each of them, and then use(row, n).
  // What `load` loads from shared memory, a thread waits for once in a batch, where it would wait
  // at each row.
  template <int kRows, int kBatch, class Load, class Use>
  __device__ __forceinline__ void for_batches(const Load& load, const Use& use) const {
    DENSE_EXT_UNROLL for (int first = 0; first * kRowsAtOnce < kRows; first += kBatch) {
      const auto each = [&](const auto& body) {
        DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) {
          if ((first + n) * kRowsAtOnce >= kRows) break;
          const int r = row + (first + n) * kRowsAtOnce;
          if (kRows % kRowsAtOnce == 0 || r < kRows) body(r, n);
        }
      };
      each(load);
      each(use);
    }
  }
  // Calls body(column, index) for the thread's units of a row.
  template <class Body>
  __device__ __forceinline__ void for_columns(const Body& body) const {
    DENSE_EXT_UNROLL for (int i = 0; i < kAcross; i++) body(column + i * kStep, i);
  }
};

// The unit that begins at an element.
template <class T>
__device__ __forceinline__ auto* unit_at(T* at) {
  using V = std::conditional_t<std::is_const_v<T>, const Bytes<16>, Bytes<16>>;
  return reinterpret_cast<V*>(at);
}

// Copies a thread's units of a tile into shared memory. For float, registers do not suffice to keep
// the addresses.
template <int kRows, class T, class Layout, class U, class Units>
__device__ __forceinline__ void copy_units(T* tile, Layout layout, int columns, Rows<U> rows,
                                           const Units& units) {
  if constexpr (sizeof(T) == 2 && kRows > Units::kRowsAtOnce) {
    rows.stride = in_register(rows.stride);
    units.for_columns([&](int c, int) {
      Rows<U> from = rows.from(c);
      from.data = in_register(from.data);
      if (c >= columns) from.count = 0;
      units.template for_rows<kRows>([&](int r, int) {
        copy_async<16>(tile + offset_in(layout, r, c), from.at(r), r < from.count);
      });
    });
  } else {
    units.template for_rows<kRows>([&](int r, int) {
      const Row<U> from = rows(r);
      units.for_columns([&](int c, int) {
        copy_async<16>(tile + offset_in(layout, r, c), from.data + c, from.exists && c < columns);
      });
    });
  }
}
// Finds the numbers of all rows before the first copy. Otherwise the compiler would put waiting
// instructions between each load of a number from shared memory and its copy.
template <int kRows, class T, class Layout, class U, class Numbers, class Units>
__device__ __forceinline__ void copy_units(T* tile, Layout layout, int columns,
                                           const ChosenRows<U, Numbers>& rows, const Units& units) {
  int numbers[(kRows + Units::kRowsAtOnce - 1) / Units::kRowsAtOnce];
  units.template for_rows<kRows>([&](int r, int i) { numbers[i] = rows.numbers(r); });
  units.for_columns([&](int c, int) {
    const U* const data = in_register(rows.all.data + c);
    const int first = c < columns ? 0 : std::numeric_limits<int>::max();
    units.template for_rows<kRows>([&](int r, int i) {
      copy_async<16>(tile + offset_in(layout, r, c),
                     address_of_row(data, numbers[i], rows.all.stride), numbers[i] >= first);
    });
  });
}

// Copies a tile into shared memory, asynchronously except for single 16-bit elements. `rows(r)` is
// row r in global memory. Columns from `columns` on, and rows that do not exist, become zeros. If
// kWide, each thread copies its own units.
template <int kRows, int kColumns, int kThreads, bool kWide, class T, class Layout, class RowAt>
__device__ __forceinline__ void copy_tile(T* tile, Layout layout, int columns, int bytes,
                                          const RowAt& rows, int thread = thread_index()) {
  if constexpr (kWide) {
    copy_units<kRows>(tile, layout, columns, rows, Units<T, kColumns, kThreads>(thread));
  } else {
    for_width<T>(bytes, [&](auto width) {
      constexpr int kBytes = decltype(width)::value;
      for_accesses<T, kBytes, kRows, kColumns, kThreads>(
          columns,
          [&](int r, int c, bool valid) {
            const auto from = rows(r);
            valid = valid && from.exists;
            if constexpr (kBytes >= 4) {
              copy_async<kBytes>(tile + offset_in(layout, r, c), from.data + c, valid);
            } else {
              store_shared(tile + offset_in(layout, r, c),
                           valid ? load_global(from.data + c) : T{0});
            }
          },
          thread);
    });
  }
}

// Writes the columns below `columns` of a tile's rows to global memory, except rows that do not
// exist there.
template <int kRows, int kColumns, int kThreads, bool kWide, class T, class Layout, class RowAt>
__device__ __forceinline__ void store_tile(const T* tile, Layout layout, int columns, int bytes,
                                           const RowAt& row, int thread = thread_index()) {
  if constexpr (kWide) {
    const Units<T, kColumns, kThreads> units(thread);
    units.template for_rows<kRows>([&](int r, int) {
      const auto to = row(r);
      units.for_columns([&](int c, int) {
        if (to.exists && c < columns) {
          store_global(unit_at(to.data + c), load_shared(unit_at(tile + offset_in(layout, r, c))));
        }
      });
    });
  } else {
    for_width<T>(bytes, [&](auto width) {
      constexpr int kBytes = decltype(width)::value;
      using V = Bytes<kBytes>;
      for_accesses<T, kBytes, kRows, kColumns, kThreads>(
          columns,
          [&](int r, int c, bool valid) {
            const auto to = row(r);
            if (!valid || !to.exists) return;
            store_global(reinterpret_cast<V*>(to.data + c),
                         load_shared(reinterpret_cast<const V*>(tile + offset_in(layout, r, c))));
          },
          thread);
    });
  }
}

// Calls compute(step, stage) for each step when load(step, stage)'s copies have arrived in shared
// memory. Copies for the next kStages - 1 steps are in flight meanwhile; stage is step % kStages.
// Each thread first calls prepare(step, stage), when only its own copies have arrived; then comes a
// barrier. At the end the stages' memory is free.
template <int kStages, class Load, class Prepare, class Compute>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Prepare& prepare,
                                         const Compute& compute) {
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) load(step, step);
    copy_async_commit();
  }
  int stage = 0;
  DENSE_EXT_NO_UNROLL for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    prepare(step, stage);
    sync_threads();
    if (step + kStages - 1 < steps) load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    copy_async_commit();
    compute(step, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  sync_threads();
}
template <int kStages, class Load, class Compute>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Compute& compute) {
  pipeline<kStages>(steps, load, [](int, int) {}, compute);
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

// A vector of kColumns floats in shared memory, one per column of a tile. A thread loads the floats
// that belong to its unit of the tile, four at a time. A unit of a 16-bit type has eight: the
// second fours of all units lie behind the first fours of all, in the other half of the banks. So
// neither neighbouring units nor the two halves of a pair of columns share a bank.
template <class T, int kColumns>
struct UnitVector {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kHalf = kElements == 8 ? kColumns / 2 | 16 : 0;
  static constexpr int kSize = kElements == 8 ? kColumns / 2 + kHalf : kColumns;

  // Where the float of a column lies.
  static __device__ int place(int column) {
    return kHalf ? column / 4 % 2 * kHalf + column / 8 * 4 + column % 4 : column;
  }
  static __device__ void load(float (&to)[kElements], const float* vector, int column) {
    DENSE_EXT_UNROLL for (int half = 0; half < kElements / 4; half++) {
      const auto four = load_shared(unit_at(vector + place(column) + half * kHalf));
      DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) to[4 * half + i] = float_of_bits(four.data[i]);
    }
  }
  static __device__ void store(float* vector, int column, const float (&from)[kElements]) {
    DENSE_EXT_UNROLL for (int half = 0; half < kElements / 4; half++) {
      Bytes<16> four;
      DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) four.data[i] = bits_of(from[4 * half + i]);
      store_shared(unit_at(vector + place(column) + half * kHalf), four);
    }
  }
};

// relu(scale*x + shift) of the elements of a unit, rounded to T.
template <class T, int kElements>
__device__ __forceinline__ Bytes<16> activated(Bytes<16> x, const float (&scale)[kElements],
                                               const float (&shift)[kElements]) {
  DENSE_EXT_UNROLL for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 2) {
      const Float2 pair = unpack<T>(x.data[w]);
      x.data[w] = pack_relu<T>(pair.x * scale[2 * w] + shift[2 * w],
                               pair.y * scale[2 * w + 1] + shift[2 * w + 1]);
    } else {
      x.data[w] = bits_of(relu(float_of_bits(x.data[w]) * scale[w] + shift[w]));
    }
  }
  return x;
}

// Applies relu(scale*x + shift) in place, rounded to T, to the rows of a tile for which `valid(r)`.
template <int kRows, int kColumns, int kThreads, class T, class Valid>
__device__ __forceinline__ void activate_rows(T* tile, int ld, const float* scale,
                                              const float* shift, const Valid& valid,
                                              int thread = thread_index()) {
  const Units<T, kColumns, kThreads> units(thread);
  using Vector = UnitVector<T, kColumns>;
  units.for_columns([&](int c, int) {
    float s[Vector::kElements], t[Vector::kElements];
    Vector::load(s, scale, c);
    Vector::load(t, shift, c);
    constexpr int kBatch = 4;
    Bytes<16> x[kBatch];
    bool exists[kBatch];
    units.template for_batches<kRows, kBatch>(
        [&](int r, int n) {
          x[n] = load_shared(unit_at(tile + r * ld + c));
          exists[n] = valid(r);
        },
        [&](int r, int n) {
          const auto value = activated<T>(x[n], s, t);
          if (exists[n]) store_shared(unit_at(tile + r * ld + c), value);
        });
  });
}

// Copies kCount values of a vector, from `first` on, into shared memory: value i to place(i).
// Beyond the vector's end, at `count`, it writes zeros.
template <int kCount, int kThreads, class Place>
__device__ __forceinline__ void copy_vector(float* shared, const float* vector, int64_t first,
                                            int64_t count, const Place& place,
                                            int thread = thread_index()) {
  DENSE_EXT_UNROLL for (int begin = 0; begin < kCount; begin += kThreads) {
    const int i = begin + thread;
    if (i < kCount) copy_async<4>(shared + place(i), vector + first + i, first + i < count);
  }
}
template <int kCount, int kThreads>
__device__ __forceinline__ void copy_vector(float* shared, const float* vector, int64_t first,
                                            int64_t count) {
  copy_vector<kCount, kThreads>(shared, vector, first, count, [](int i) { return i; });
}

}  // namespace dense_ext
