// A warp's matrix products: loading fragments of the two factors from shared memory, and adding
// their product to the warp's accumulators.
//
// A product sums over a depth k: c[row][column] += a[row][k] * b[k][column]. 16-bit types use
// tensor cores; float uses tensor cores in tf32, or FMAs if it is to be exact.

#pragma once

#include "tile.cuh"

namespace dense_ext {

// The arithmetic of a product: the storage type of its factors, and whether float is exact.
template <class T_, bool kExact_>
struct Arithmetic {
  using T = T_;
  static constexpr bool kExact = kExact_;
  static constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // of one fragment
};

// Calls body(Arithmetic<T, exact>{}).
template <class T, class Body>
void with_arithmetic(bool tf32, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (!tf32) return body(Arithmetic<T, true>{});
  }
  body(Arithmetic<T, false>{});
}

// The distance between the rows of a tile in shared memory, in elements: an odd number of 16-byte
// units, so that eight rows at the same column are in different banks.
template <class T>
constexpr int padded(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// A fragment of a with 16 rows, from a tile whose k are contiguous. `offset(r)` is the offset of
// row r in the tile.
template <class T>
struct RowFragment {
  static constexpr bool kTransposed = false;
  static constexpr int kCount = sizeof(T) == 2 ? 1 : 2;
  int at[kCount];

  template <class Offset>
  __device__ explicit RowFragment(const Offset& offset) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
      at[0] = offset(lane % 16) + lane / 16 * 8;
    } else {
      at[0] = offset(lane / 4) + lane % 4;
      at[1] = offset(lane / 4 + 8) + lane % 4;
    }
  }

  // `tile` points to the fragment's first k.
  __device__ void load(uint32_t (&r)[4], const T* tile) const {
    if constexpr (sizeof(T) == 2) {
      load_matrices<false>(r, tile + at[0]);
    } else {
      r[0] = bits_of(load_shared(tile + at[0]));
      r[1] = bits_of(load_shared(tile + at[1]));
      r[2] = bits_of(load_shared(tile + at[0] + 4));
      r[3] = bits_of(load_shared(tile + at[1] + 4));
    }
  }
};

// A fragment of a with 16 rows, from a tile whose rows of a are contiguous. `offset(k)` is the
// offset of depth k in the tile.
template <class T>
struct TransposedRowFragment {
  static constexpr bool kTransposed = true;
  static constexpr int kCount = sizeof(T) == 2 ? 1 : 2;
  int at[kCount];

  template <class Offset>
  __device__ explicit TransposedRowFragment(const Offset& offset) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
      at[0] = offset(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8;
    } else {
      at[0] = offset(lane % 4) + lane / 4;
      at[1] = offset(lane % 4 + 4) + lane / 4;
    }
  }

  // `tile` points to the fragment's first row.
  __device__ void load(uint32_t (&r)[4], const T* tile) const {
    if constexpr (sizeof(T) == 2) {
      load_matrices<true>(r, tile + at[0]);
    } else {
      r[0] = bits_of(load_shared(tile + at[0]));
      r[1] = bits_of(load_shared(tile + at[0] + 8));
      r[2] = bits_of(load_shared(tile + at[1]));
      r[3] = bits_of(load_shared(tile + at[1] + 8));
    }
  }
};

// Two fragments of b with 8 columns each, from a tile [column][k].
template <class T>
struct ColumnFragments {
  static constexpr bool kTransposed = false;
  int at;

  __device__ explicit ColumnFragments(int ld) {
    const int lane = lane_index();
    at = sizeof(T) == 2 ? (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8
                        : lane / 4 * ld + lane % 4;
  }

  // `tile` points to the fragments' first column and k.
  __device__ void load(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int ld) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      load_matrices<false>(r, tile + at);
      b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
    } else {
      b0[0] = bits_of(load_shared(tile + at));
      b0[1] = bits_of(load_shared(tile + at + 4));
      b1[0] = bits_of(load_shared(tile + at + 8 * ld));
      b1[1] = bits_of(load_shared(tile + at + 8 * ld + 4));
    }
  }
};

// Two fragments of b with 8 columns each, from a tile [k][column]. In 16 bits the second one lies
// `beside` columns further; if that is 0, it is the first one again.
template <class T>
struct TransposedColumnFragments {
  static constexpr bool kTransposed = true;
  int at;

  __device__ explicit TransposedColumnFragments(int ld, int beside = 8) {
    const int lane = lane_index();
    at = sizeof(T) == 2 ? (lane % 8 + lane / 8 % 2 * 8) * ld + lane / 16 * beside
                        : lane % 4 * ld + lane / 4;
  }

  __device__ void load(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int ld) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      load_matrices<true>(r, tile + at);
      b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
    } else {
      b0[0] = bits_of(load_shared(tile + at));
      b0[1] = bits_of(load_shared(tile + at + 4 * ld));
      b1[0] = bits_of(load_shared(tile + at + 8));
      b1[1] = bits_of(load_shared(tile + at + 4 * ld + 8));
    }
  }
};

// Fragments from a tile with TileLayout: of a, whose k or whose rows are contiguous, and two of b,
// from a tile [k][column]. `further` is a number of columns known to the compiler. Added to
// `column` it may change no bit that `column` has: then the address changes in its bits only, and
// further fragments need no register.
template <class T, int kColumns>
struct TileFragments {
  using Layout = TileLayout<T, kColumns>;

  static __device__ __forceinline__ void load_rows(uint32_t (&r)[4], const T* tile, int row,
                                                   int column, int further) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
      load<false>(r, tile, row + lane % 16, column + lane / 16 * 8, 0, further);
    } else {
      load(r, tile, row + lane / 4, column + further + lane % 4, 8, 4);
    }
  }
  static __device__ __forceinline__ void load_transposed_rows(uint32_t (&r)[4], const T* tile,
                                                              int k, int column, int further) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
      load<true>(r, tile, lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8, k, further);
    } else {
      load(r, tile, k + lane % 4, column + further + lane / 4, 4, 8);
      const uint32_t second = r[1];
      r[1] = r[2], r[2] = second;
    }
  }
  static __device__ __forceinline__ void load_transposed_columns(uint32_t (&b0)[2],
                                                                 uint32_t (&b1)[2], const T* tile,
                                                                 int k, int column, int further) {
    const int lane = lane_index();
    uint32_t r[4];
    if constexpr (sizeof(T) == 2) {
      load<true>(r, tile, lane % 16, column + lane / 16 * 8, k, further);
    } else {
      load(r, tile, k + lane % 4, column + further + lane / 4, 4, 8);
    }
    b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
  }

 private:
  template <bool kTransposed>
  static __device__ __forceinline__ void load(uint32_t (&r)[4], const T* tile, int row, int column,
                                              int down, int further) {
    load_matrices<kTransposed>(r, tile + offset_in(Layout{}, row, column),
                               static_cast<uint32_t>(further % 64 * 2),
                               static_cast<uint32_t>((down * Layout::kLd + further / 64 * 64) * 2));
  }
  // r[i] is i % 2 * rows further down and i / 2 * columns further right.
  static __device__ __forceinline__ void load(uint32_t (&r)[4], const T* tile, int row, int column,
                                              int rows, int columns) {
    DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) {
      const int at = offset_in(Layout{}, row + i % 2 * rows, column + i / 2 * columns);
      r[i] = bits_of(load_shared(tile + at));
    }
  }
};

// --- batch norm and ReLU in registers --------------------------------------------------------

// Applies batch norm and ReLU to a fragment of b, of which a lane holds values of one column only.
template <class T>
__device__ __forceinline__ void activate_column(uint32_t (&b)[2], float scale, float shift) {
  DENSE_EXT_UNROLL for (int i = 0; i < 2; i++) {
    if constexpr (sizeof(T) == 2) {
      const Float2 x = unpack<T>(b[i]);
      b[i] = pack_relu<T>(x.x * scale + shift, x.y * scale + shift);
    } else {
      b[i] = bits_of(relu(float_of_bits(b[i]) * scale + shift));
    }
  }
}

// Zeroes the elements of fragments of b whose k, a row of a tile, is masked out by `keep`.
template <class T, int kColumns>
__device__ __forceinline__ void keep_rows(uint32_t (&b)[kColumns][2], const BitsOf<T>* keep) {
  const int t = lane_index() % 4;
  DENSE_EXT_UNROLL for (int i = 0; i < 2; i++) {
    uint32_t bits;
    if constexpr (sizeof(T) == 2) {
      bits = load_shared(reinterpret_cast<const uint32_t*>(keep + 2 * t + 8 * i));
    } else {
      bits = load_shared(keep + t + 4 * i);
    }
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) b[j][i] &= bits;
  }
}

// --- the product -----------------------------------------------------------------------------

// c[i][first + j] += a[first_row + i] @ b[j] for a warp's fragments of 16 x 8 values.
template <class Math, int kRows, int kAllColumns, int kAllRows, int kColumns>
__device__ __forceinline__ void multiply(float (&c)[kRows][kAllColumns][4],
                                         uint32_t (&a)[kAllRows][4], uint32_t (&b)[kColumns][2],
                                         int first = 0, int first_row = 0) {
  using T = typename Math::T;
  if constexpr (sizeof(T) == 4 && Math::kExact) {
    // At each k, a lane collects its rows and columns from the lanes that hold them.
    const int lane = lane_index(), g = lane / 4 * 4, t = lane % 4;
    DENSE_EXT_UNROLL for (int k = 0; k < 8; k++) {
      float rows[kRows][2];
      DENSE_EXT_UNROLL for (int i = 0; i < kRows; i++) {
        DENSE_EXT_UNROLL for (int half = 0; half < 2; half++) {
          rows[i][half] = float_of_bits(shuffle(a[first_row + i][k / 4 * 2 + half], g + k % 4));
        }
      }
      DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
        const float left = float_of_bits(shuffle(b[j][k / 4], 8 * t + k % 4));
        const float right = float_of_bits(shuffle(b[j][k / 4], 8 * t + 4 + k % 4));
        DENSE_EXT_UNROLL for (int i = 0; i < kRows; i++) {
          c[i][first + j][0] += rows[i][0] * left;
          c[i][first + j][1] += rows[i][0] * right;
          c[i][first + j][2] += rows[i][1] * left;
          c[i][first + j][3] += rows[i][1] * right;
        }
      }
    }
  } else {
    if constexpr (sizeof(T) == 4) {
      DENSE_EXT_UNROLL for (int i = first_row; i < first_row + kRows; i++) {
        DENSE_EXT_UNROLL for (int r = 0; r < 4; r++) a[i][r] = tf32_of(float_of_bits(a[i][r]));
      }
      DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
        DENSE_EXT_UNROLL for (int r = 0; r < 2; r++) b[j][r] = tf32_of(float_of_bits(b[j][r]));
      }
    }
    DENSE_EXT_UNROLL for (int i = 0; i < kRows; i++) {
      DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
        multiply_accumulate<T>(c[i][first + j], a[first_row + i], b[j]);
      }
    }
  }
}

// c += a @ b over a depth of kDepth, for two tiles with kRowLd and kColumnLd elements between their
// rows. They begin with the warp's first row of a and first column of b.
template <class Math, int kDepth, int kRowLd, int kColumnLd, class Rows, class Columns, int kRows,
          int kColumns>
__device__ __forceinline__ void multiply_tiles(float (&c)[kRows][kColumns][4], const Rows& rows,
                                               const typename Math::T* a, const Columns& columns,
                                               const typename Math::T* b) {
  // The distances between rows of a, between columns of b, and between steps in depth.
  constexpr int kRow = Rows::kTransposed ? 1 : kRowLd, kRowStep = Rows::kTransposed ? kRowLd : 1;
  constexpr int kColumn = Columns::kTransposed ? 1 : kColumnLd;
  constexpr int kColumnStep = Columns::kTransposed ? kColumnLd : 1;
  DENSE_EXT_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) {
    uint32_t row[kRows][4];
    DENSE_EXT_UNROLL for (int i = 0; i < kRows; i++) {
      rows.load(row[i], a + 16 * i * kRow + k * kRowStep);
    }
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j += 4) {
      uint32_t column[4][2];
      DENSE_EXT_UNROLL for (int n = 0; n < 4; n += 2) {
        columns.load(column[n], column[n + 1], b + 8 * (j + n) * kColumn + k * kColumnStep,
                     kColumnLd);
      }
      multiply<Math>(c, row, column, j);
    }
  }
}

// The position of a lane's values in a 16 x 8 fragment of c: rows `row` and row + 8, columns
// `column` and column + 1.
struct Position {
  int row, column;
  __device__ Position() : row(lane_index() / 4), column(lane_index() % 4 * 2) {}
};

// Loads a lane's values of a 16 x 16 part of a tile: those at the positions of its values of two
// fragments of c. pairs[j][half] belongs to c[j][2 * half] and c[j][2 * half + 1].
template <class T, int kColumns>
__device__ __forceinline__ void load_pairs(Float2 (&pairs)[2][2], const T* part,
                                           const TileLayout<T, kColumns>& layout) {
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    TileFragments<T, kColumns>::load_rows(r, part, 0, layout.first, 0);
    DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) pairs[i / 2][i % 2] = unpack<T>(r[i]);
  } else {
    const Position at;
    DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) {
      pairs[i / 2][i % 2] =
          load_pair(part + offset_in(layout, at.row + i % 2 * 8, i / 2 * 8 + at.column));
    }
  }
}

// Every lane has sums over its columns of c, two per fragment. This adds them over the lanes of
// each warp of kWarps that share the columns, into `scratch` [kWarps][2][kColumns]. `warp` numbers
// these warps, and `first` is the warp's first column.
template <int kColumns, int kFragments>
__device__ __forceinline__ void leave_column_sums(float* scratch, float (&g)[kFragments][2],
                                                  float (&gx)[kFragments][2], int warp, int first) {
  const Position at;
  DENSE_EXT_UNROLL for (int j = 0; j < kFragments; j++) {
    DENSE_EXT_UNROLL for (int e = 0; e < 2; e++) {
      DENSE_EXT_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) {
        g[j][e] += shuffle_xor(g[j][e], mask);
        gx[j][e] += shuffle_xor(gx[j][e], mask);
      }
      if (at.row > 0) continue;
      float* part = scratch + warp * 2 * kColumns + first + 8 * j + at.column + e;
      store_shared(part, g[j][e]);
      store_shared(part + kColumns, gx[j][e]);
    }
  }
}

// After a barrier: adds the warps' sums, and writes the first `count` of the block's columns.
template <int kThreads, int kWarps, int kColumns>
__device__ __forceinline__ void add_column_sums(const float* scratch, int count, float* to_g,
                                                float* to_gx) {
  for (int i = thread_index(); i < 2 * kColumns; i += kThreads) {
    if (i % kColumns >= count) continue;
    float total = 0;
    for (int w = 0; w < kWarps; w++) total += load_shared(scratch + w * 2 * kColumns + i);
    store_global((i < kColumns ? to_g : to_gx) + i % kColumns, total);
  }
}

// Calls body(row, column, x, y) for each two neighbouring values x and y of c that a lane holds.
template <int kRows, int kColumns, class Body>
__device__ __forceinline__ void for_pairs(const float (&c)[kRows][kColumns][4], const Body& body) {
  const Position at;
  DENSE_EXT_UNROLL for (int i = 0; i < kRows; i++) {
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
      body(16 * i + at.row, 8 * j + at.column, c[i][j][0], c[i][j][1]);
      body(16 * i + at.row + 8, 8 * j + at.column, c[i][j][2], c[i][j][3]);
    }
  }
}

}  // namespace dense_ext
