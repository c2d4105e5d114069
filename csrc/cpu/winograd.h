// 3x3 convolutions by Winograd's F(2x2, 3x3): Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks" (2016). A tile of 2x2 outputs takes 16 products of a channel instead of 36:
//
//   y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A,   where * is elementwise,
//
// d is the tile's 4x4 inputs and g the 3x3 weights. Each of the 16 points is a matrix product over
// the channels. Its sums have a ninth of the terms of a direct convolution, whose rounding errors
// are thus larger: docs/backends/cpu.md has figures. A tile's outputs share all of its inputs, so
// one that is not finite spoils them all: then the caller convolves directly.

#pragma once

#include <cstdint>

#include "bands.h"
#include "conv3x3.h"
#include "gemm.h"
#include "parallel.h"

namespace dense_ext {

constexpr int64_t kPoints = 16;  // the products of a tile
// The tiles that are multiplied together fill two register tiles of AVX-512. The points of 128
// channels take 230 KB.
constexpr int64_t kGroupTiles = 28;

// Pairs would be rounded once more, after the transform.
template <class E>
constexpr bool kWinograd = !kIsPair<E>;

// Whether it takes less time than nine taps, for so many images that are convolved together. The
// constants are measured: the time of a tile, whose transforms come to its 16 products, and of
// reading 16 points of the weight instead of 9 taps. dense_ext/backends/cpu.py has the same rule.
template <class E>
bool winograd_pays(int64_t images, int64_t height, int64_t width) {
  constexpr int64_t kTileCost = 20, kWeightCost = 90;
  const int64_t tiles = images * ceil_div(height, 2) * ceil_div(width, 2);
  return kWinograd<E> && kTaps * images * height * width > kTileCost * tiles + kWeightCost;
}

// A volume's images are convolved one by one, since a window's planes may lie outside the volume.
template <class E, class T>
bool winograd_pays(const Volumes<T>& pixels) {
  return winograd_pays<E>(pixels.planes > 1 ? 1 : pixels.images, pixels.height, pixels.width);
}

// Calls put(i, value) for the four values of B^T d.
template <class V, class Put>
inline void transform_input(V d0, V d1, V d2, V d3, const Put& put) {
  put(0, d0 - d2);
  put(1, d1 + d2);
  put(2, d2 - d1);
  put(3, d1 - d3);
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
      for (int64_t j = range.begin * kPanel<E>; j < range.end * kPanel<E>; j += kLanes<E>) {
        const auto transform = [](const auto& g, const auto& put) {
          const V half = (g(0) + g(2)) / 2;
          put(0, g(0));
          put(1, half + g(1) / 2);
          put(2, half - g(1) / 2);
          put(3, g(2));
        };
        transform_both_sides<V, 3, 4>(
            transform, [&](int i, int x) { return load(g + (3 * i + x) * size + j); },
            [&](int i, int x, V v) { store(u + (4 * i + x) * size + j, v); });
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
template <class A>
struct TileRow {
  const A* in;  // the upper left neighbour of the first pixel, in lines of width + 2 pixels
  A* out;       // the first output, in lines of `width` pixels
  int64_t lines;
};

// The convolution of padded images with a weight, by groups of tiles.
template <class A>
struct WinogradProduct {
  using V = Vector<A>;

  int64_t width;             // of an image, in pixels
  int64_t depth, columns;    // the channels of the input that are summed over, and of the output
  int64_t in_ld, out_ld;     // the distances between the input's pixels, and the output's
  const A* b;                // the points of the weight
  int64_t b_depth, b_panel;  // the channels of a point, and the distance between panels
  bool accumulate;           // whether to add to the output

  // The distances between the tiles of a point.
  int64_t input_ld() const { return whole_vectors<A>(depth); }
  int64_t output_ld() const { return whole_vectors<A>(columns); }
  // The distance between points. The vector beside a point keeps others out of its cache sets.
  int64_t input_stride() const { return kGroupTiles * input_ld() + kLanes<A>; }
  int64_t output_stride() const { return kGroupTiles * output_ld() + kLanes<A>; }

  // B^T d B of a group's inputs, [16][tiles][input_ld], in scratch. row(i) is the i-th TileRow.
  template <class Rows>
  const A* transform_inputs(Range group, const Rows& row) const {
    A* points = scratch<A>(Slot::kPoints, kPoints * input_stride());
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      transform_input_row(row(i), tiles, points + place * input_ld());
    });
    return points;
  }

  // A y A^T of a group's outputs, [16][tiles][output_ld], in scratch.
  template <class Rows>
  const A* transform_outputs(Range group, const Rows& row) const {
    A* points = scratch<A>(Slot::kPointProducts, kPoints * output_stride());
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      transform_output_row(row(i), tiles, points + place * output_ld());
    });
    return points;
  }

  // Writes a group's outputs from the points of its inputs. Returns whether they are finite.
  template <class Rows>
  bool write_outputs(Range group, const A* points, const Rows& row) const {
    A* products = scratch<A>(Slot::kPointProducts, kPoints * output_stride());
    for (int64_t p = 0; p < kPoints; p++) {
      multiply(Product<A>{.rows = group.size(),
                          .columns = columns,
                          .depth = depth,
                          .a = points + p * input_stride(),
                          .a_row = input_ld(),
                          .a_depth = 1,
                          .b = b + p * b_depth * kPanel<A>,
                          .b_panel = b_panel,
                          .b_depth = kPanel<A>,
                          .c = products + p * output_stride(),
                          .c_row = output_ld()});
    }
    bool finite = true;
    for_tile_rows(width, group, [&](int64_t i, Range tiles, int64_t place) {
      finite &= write_output_row(row(i), tiles, products + place * output_ld());
    });
    return finite;
  }

 private:
  void transform_input_row(const TileRow<A>& row, Range tiles, A* points) const {
    const int64_t line = (width + 2) * in_ld;
    for (int64_t j = 0; j < depth; j += kLanes<A>) {
      // B^T d for a column of pixels. A tile may reach beyond the border, where all is zero.
      V columns[4][4];
      const auto read = [&](int64_t x, V* column) {
        const A* pixel = row.in + x * in_ld + j;
        const auto at = [&](int64_t i) {
          return x < width + 2 && i < row.lines + 2 ? load(pixel + i * line) : V{};
        };
        transform_input(at(0), at(1), at(2), at(3), [&](int64_t i, V v) { column[i] = v; });
      };
      read(2 * tiles.begin, columns[0]);
      read(2 * tiles.begin + 1, columns[1]);
      A* point = points + j;
      for (int64_t t = tiles.begin; t < tiles.end; t++, point += input_ld()) {
        read(2 * t + 2, columns[2]);
        read(2 * t + 3, columns[3]);
        DENSE_UNROLL for (int i = 0; i < 4; i++) {
          transform_input(columns[0][i], columns[1][i], columns[2][i], columns[3][i],
                          [&](int64_t x, V v) { store(point + (4 * i + x) * input_stride(), v); });
          columns[0][i] = columns[2][i];  // the next tile overlaps with this one
          columns[1][i] = columns[3][i];
        }
      }
    }
  }

  void transform_output_row(const TileRow<A>& row, Range tiles, A* points) const {
    for (int64_t t = tiles.begin; t < tiles.end; t++, points += output_ld()) {
      const A* tile = row.out + 2 * t * out_ld;
      const bool right = 2 * t + 1 < width, below = row.lines > 1;
      for (int64_t j = 0; j < columns; j += kLanes<A>) {
        const auto transform = [](const auto& y, const auto& put) {
          put(0, y(0));
          put(1, y(0) + y(1));
          put(2, y(0) - y(1));
          put(3, -y(1));
        };
        const auto at = [&](int i, int x) {
          const bool exists = (i == 0 || below) && (x == 0 || right);
          return exists ? load(tile + (i * width + x) * out_ld + j) : V{};
        };
        transform_both_sides<V, 2, 4>(transform, at, [&](int i, int x, V v) {
          store(points + (4 * i + x) * output_stride() + j, v);
        });
      }
    }
  }

  bool write_output_row(const TileRow<A>& row, Range tiles, const A* products) const {
    V probe = {};  // 0 * y, summed: NaN if a y is not finite
    for (int64_t t = tiles.begin; t < tiles.end; t++, products += output_ld()) {
      A* tile = row.out + 2 * t * out_ld;
      const bool right = 2 * t + 1 < width, below = row.lines > 1;
      for (int64_t j = 0; j < columns; j += kLanes<A>) {
        const auto transform = [](const auto& m, const auto& put) {
          put(0, m(0) + m(1) + m(2));
          put(1, m(1) - m(2) - m(3));
        };
        const auto at = [&](int i, int x) {
          return load(products + (4 * i + x) * output_stride() + j);
        };
        transform_both_sides<V, 4, 2>(transform, at, [&](int i, int x, V v) {
          if ((i && !below) || (x && !right)) return;
          probe += 0 * v;
          A* out = tile + (i * width + x) * out_ld + j;
          store(out, accumulate ? load(out) + v : v);
        });
      }
    }
    A sums[kLanes<A>];
    store(sums, probe);
    return std::all_of(sums, sums + kLanes<A>, [](A sum) { return sum == 0; });
  }
};

// The rows of tiles of a band that is padded in `in`.
template <class A>
struct BandTiles {
  const Band& band;
  const A* in;
  int64_t in_ld;
  A* out;
  int64_t out_ld;

  int64_t image_rows() const { return ceil_div(band.rows, 2); }
  TileRow<A> operator()(int64_t row) const {
    const int64_t above = 2 * (row % image_rows()), line = row / image_rows() * band.rows + above;
    return {in + band.padded_line(line) * in_ld, out + line * band.width * out_ld,
            std::min<int64_t>(2, band.rows - above)};
  }

  // Calls body(tiles, line) for images that all have a plane of the window, or all lack it. `line`
  // is their first.
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
