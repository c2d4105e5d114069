// 3x3 convolutions by Winograd's F(2x2, 3x3): Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks" (2016). A tile of 2x2 outputs takes 16 products of a channel instead of 36:
//
//   y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A,   where * is elementwise,
//
// d is the tile's 4x4 inputs and g the 3x3 weights. Each of the 16 points is a matrix product of
// its own, tiles x channels. The sums are of a ninth as many terms as a direct convolution's, which
// makes float32 results more exact: see docs/backends/cpu.md. The transforms use values of a
// neighbourhood, so where a result is not finite, the caller has to convolve directly.

#pragma once

#include <cstdint>

#include "bands.h"
#include "conv3x3.h"
#include "gemm.h"
#include "parallel.h"

namespace dense_ext {

constexpr int64_t kPoints = 16;  // the products of a tile
// The tiles that are multiplied together: two register tiles of AVX-512. For 128 channels they take
// some 230 KB.
constexpr int64_t kGroupTiles = 28;

// Pairs would be rounded again after the transform.
template <class E>
constexpr bool kWinograd = !kIsPair<E>;

// Whether it takes less time than nine taps for so many images that are convolved together. The constants are measured:
// what the transforms add to the 16 products, and what reading 16 weights instead of 9 costs.
template <class E>
bool winograd_pays(int64_t images, int64_t height, int64_t width) {
  constexpr int64_t kTileCost = 20, kWeightCost = 90;
  const int64_t tiles = images * ceil_div(height, 2) * ceil_div(width, 2);
  return kWinograd<E> && kTaps * images * height * width > kTileCost * tiles + kWeightCost;
}

// For volumes, whose planes may lie at their border, each image is convolved alone.
template <class E, class T>
bool winograd_pays(const Volumes<T>& pixels) {
  return winograd_pays<E>(pixels.planes > 1 ? 1 : pixels.images, pixels.height, pixels.width);
}

// Calls store(i, value) for the four values of B^T d.
template <class V, class Store>
inline void transform_input(const V& d0, const V& d1, const V& d2, const V& d3,
                            const Store& store) {
  store(0, d0 - d2);
  store(1, d1 + d2);
  store(2, d2 - d1);
  store(3, d1 - d3);
}

// The elements of a weight's points; 0 if they are not wanted.
template <class T>
int64_t points_size(const WeightsAsB<T>& weights, bool wanted) {
  return wanted ? weights.packed_size() / kTaps * kPoints : 0;
}

// Packed taps [panels][planes][9][depth][kPanel] to points [panels][planes][16][depth][kPanel].
template <class T, class E>
void transform_weights(const WeightsAsB<T>& weights, const E* packed, E* points) {
  using V = Vector<E>;
  const int64_t depth = weights.depth, panels = weights.panels() * weights.taps / kTaps;
  const int64_t size = depth * kPanel<E>, parts = std::min(num_threads(), depth);
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(depth, parts, part);
    for (int64_t panel = 0; panel < panels; panel++) {
      const E* g = packed + panel * kTaps * size;
      E* u = points + panel * kPoints * size;
      for (int64_t i = range.begin * kPanel<E>; i < range.end * kPanel<E>; i += kLanes<E>) {
        // G g and then (G g) G^T, whose rows are g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2.
        V rows[4][3];
        const auto transform = [](V g0, V g1, V g2, const auto& put) {
          const V half = (g0 + g2) / 2;
          put(0, g0);
          put(1, half + g1 / 2);
          put(2, half - g1 / 2);
          put(3, g2);
        };
        for (int64_t x = 0; x < 3; x++) {
          transform(load(g + x * size + i), load(g + (3 + x) * size + i),
                    load(g + (6 + x) * size + i), [&](int64_t r, V v) { rows[r][x] = v; });
        }
        for (int64_t r = 0; r < 4; r++) {
          transform(rows[r][0], rows[r][1], rows[r][2],
                    [&](int64_t x, V v) { store(u + (4 * r + x) * size + i, v); });
        }
      }
    }
  });
}

// Calls body(tiles) for groups of the tiles.
template <class Body>
void for_tile_groups(Range tiles, const Body& body) {
  const int64_t groups = ceil_div(tiles.size(), kGroupTiles);
  for (int64_t g = 0; g < groups; g++) {
    const Range group = part_of(tiles.size(), groups, g);
    body(Range{tiles.begin + group.begin, tiles.begin + group.end});
  }
}

// Calls body(row, tiles of the row, place of the first in the group) for the rows of a group. The
// tiles of images `width` pixels wide count on from row to row.
template <class Body>
void for_tile_rows(int64_t width, Range group, const Body& body) {
  const int64_t row_tiles = ceil_div(width, 2);
  for (int64_t t = group.begin; t < group.end;) {
    const int64_t row = t / row_tiles, first = t % row_tiles;
    const int64_t last = std::min(row_tiles, first + group.end - t);
    body(row, Range{first, last}, t - group.begin);
    t += last - first;
  }
}

// A row of tiles: two lines of an image, or its last one.
template <class E>
struct TileRow {
  const E* a;  // the upper left neighbour of the first pixel, in lines of width + 2 pixels
  Acc<E>* c;   // the first output, in lines of `width` pixels
  int64_t lines;
};

// Outputs of tiles: C (+)= the convolution of `a` with a panel's weights.
template <class E>
struct WinogradProduct {
  using A = Acc<E>;
  using V = Vector<E>;

  int64_t width;            // of an image, in pixels
  int64_t depth, columns;   // the channels that are summed over, and those of C
  int64_t a_ld, c_ld;       // the distances between pixels
  const E* b;               // points of the weights; the panels are b_panel apart
  int64_t b_depth, b_panel;  // b_depth: the channels of a point's weights
  bool accumulate;
  Prefetch prefetch[2] = {};

  int64_t v_ld() const { return whole_vectors<E>(depth); }
  int64_t m_ld() const { return whole_vectors<E>(columns); }
  // The distance between points of a group. The vector beside its rows keeps points out of the same
  // cache sets.
  static int64_t point_stride(int64_t ld) { return kGroupTiles * ld + kLanes<E>; }

  // The points [16][tiles][v_ld] of a group, in scratch; row(i) is the i-th TileRow.
  template <class Row>
  E* transform(Range group, const Row& row) const {
    E* points = scratch<E>(Slot::kPoints, kPoints * point_stride(v_ld()));
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      transform_row(row(i), tiles, points + place * v_ld());
    });
    return points;
  }

  // Computes C from the points of a group; returns whether all of it is finite.
  template <class Row>
  bool multiply_points(Range group, const E* points, const Row& row) const {
    A* m = scratch<A>(Slot::kPointProducts, kPoints * point_stride(m_ld()));
    for (int64_t p = 0; p < kPoints; p++) {
      for (const Prefetch& rows : prefetch) rows.fetch(p, kPoints);
      multiply(Product<E>{.rows = group.size(),
                          .columns = columns,
                          .depth = depth,
                          .a = points + p * point_stride(v_ld()),
                          .a_row = v_ld(),
                          .a_depth = 1,
                          .b = b + p * b_depth * kPanel<E>,
                          .b_panel = b_panel,
                          .b_depth = kPanel<E>,
                          .c = m + p * point_stride(m_ld()),
                          .c_row = m_ld()});
    }
    bool finite = true;
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      finite &= write_row(row(i), tiles, m + place * m_ld());
    });
    return finite;
  }

  // The points A c A^T of a group of outputs, [16][tiles][m_ld], in scratch.
  template <class Row>
  const A* transform_outputs(Range group, const Row& row) const {
    A* points = scratch<A>(Slot::kPointProducts, kPoints * point_stride(m_ld()));
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      transform_output_row(row(i), tiles, points + place * m_ld());
    });
    return points;
  }

 private:
  void transform_output_row(const TileRow<A>& row, Range tiles, A* points) const {
    using V = Vector<A>;
    const int64_t stride = point_stride(m_ld());
    for (int64_t t = tiles.begin; t < tiles.end; t++, points += m_ld()) {
      const A* c = row.c + 2 * t * c_ld;
      const bool right = 2 * t + 1 < width, below = row.lines > 1;
      for (int64_t j = 0; j < columns; j += kLanes<A>) {
        const auto at = [&](bool exists, int64_t place) {
          return exists ? load(c + place * c_ld + j) : V{};
        };
        const auto transform = [](V c0, V c1, const auto& put) {
          put(0, c0);
          put(1, c0 + c1);
          put(2, c0 - c1);
          put(3, -c1);
        };
        V rows[4][2];
        for (int64_t x = 0; x < 2; x++) {
          const bool inside = x == 0 || right;
          transform(at(inside, x), at(inside && below, width + x),
                    [&](int64_t i, V v) { rows[i][x] = v; });
        }
        for (int64_t i = 0; i < 4; i++) {
          transform(rows[i][0], rows[i][1],
                    [&](int64_t x, V v) { store(points + (4 * i + x) * stride + j, v); });
        }
      }
    }
  }

  void transform_row(const TileRow<E>& row, Range tiles, E* points) const {
    const int64_t line = (width + 2) * a_ld, stride = point_stride(v_ld());
    for (int64_t j = 0; j < depth; j += kLanes<E>) {
      // B^T d for a column of pixels. Tiles may reach beyond the border, where all is zero.
      V columns[4][4];
      const auto read = [&](int64_t x, V* out) {
        const E* d = row.a + x * a_ld + j;
        const bool inside = x < width + 2;
        const auto at = [&](int64_t i) { return load(d + i * line); };
        transform_input<V>(inside ? at(0) : V{}, inside ? at(1) : V{}, inside ? at(2) : V{},
                           inside && row.lines > 1 ? at(3) : V{},
                           [&](int64_t i, V v) { out[i] = v; });
      };
      read(2 * tiles.begin, columns[0]);
      read(2 * tiles.begin + 1, columns[1]);
      E* out = points + j;
      for (int64_t t = tiles.begin; t < tiles.end; t++, out += v_ld()) {
        read(2 * t + 2, columns[2]);
        read(2 * t + 3, columns[3]);
        DENSE_UNROLL for (int i = 0; i < 4; i++) {
          transform_input<V>(columns[0][i], columns[1][i], columns[2][i], columns[3][i],
                             [&](int64_t x, V v) { store(out + (4 * i + x) * stride, v); });
          columns[0][i] = columns[2][i];
          columns[1][i] = columns[3][i];
        }
      }
    }
  }

  bool write_row(const TileRow<E>& row, Range tiles, const A* m) const {
    using V = Vector<A>;
    const int64_t stride = point_stride(m_ld());
    V probe = {};  // 0 * y, summed: NaN if a y is not finite
    for (int64_t t = tiles.begin; t < tiles.end; t++, m += m_ld()) {
      A* c = row.c + 2 * t * c_ld;
      const bool right = 2 * t + 1 < width, below = row.lines > 1;
      for (int64_t j = 0; j < columns; j += kLanes<E>) {
        // A^T m and then (A^T m) A, whose rows are m0 + m1 + m2 and m1 - m2 - m3.
        V rows[2][4];
        DENSE_UNROLL for (int x = 0; x < 4; x++) {
          const auto at = [&](int64_t i) { return load(m + (4 * i + x) * stride + j); };
          const V m1 = at(1), m2 = at(2);
          rows[0][x] = at(0) + m1 + m2;
          rows[1][x] = m1 - m2 - at(3);
        }
        const auto put = [&](bool wanted, int64_t place, V v) {
          probe += v * 0;
          A* out = c + place * c_ld + j;
          if (wanted) store(out, accumulate ? load(out) + v : v);
        };
        put(true, 0, rows[0][0] + rows[0][1] + rows[0][2]);
        put(right, 1, rows[0][1] - rows[0][2] - rows[0][3]);
        put(below, width, rows[1][0] + rows[1][1] + rows[1][2]);
        put(below && right, width + 1, rows[1][1] - rows[1][2] - rows[1][3]);
      }
    }
    A values[kLanes<E>];
    store(values, probe);
    return std::all_of(values, values + kLanes<E>, [](A value) { return value == 0; });
  }
};

// The tiles of a band, padded in `a`, and their outputs in `c`. Call it with a row of tiles.
template <class E>
struct BandTiles {
  const Band& band;
  const E* a;
  int64_t a_ld;
  Acc<E>* c;
  int64_t c_ld;

  int64_t image_rows() const { return ceil_div(band.rows, 2); }
  TileRow<E> operator()(int64_t row) const {
    const int64_t above = 2 * (row % image_rows()), line = row / image_rows() * band.rows + above;
    return {a + band.padded_line(line) * a_ld, c + line * band.width * c_ld,
            std::min<int64_t>(2, band.rows - above)};
  }

  // Calls body(tiles, line) for runs of images of which all or none have a plane; `line` is the
  // first.
  template <class Body>
  void for_images(const Body& body) const {
    const int64_t at_once = band.planes > 1 ? 1 : band.images;
    const int64_t tiles = image_rows() * ceil_div(band.width, 2);
    for (int64_t i = 0; i < band.images; i += at_once) {
      body(Range{i * tiles, (i + at_once) * tiles}, i * band.rows);
    }
  }
};

}  // namespace dense_ext
