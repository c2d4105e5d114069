// A dense block whose norms all use their running statistics, layer by layer:
//   z = relu(scale1*x + shift1) @ W1^T,  y = conv3x3(relu(scale2*z + shift2), W3)
//
// x [N, H, W, Ct] holds the block's input in its first channels; each layer's y follows the
// channels that the layer reads. W1 [B, C], W3 [K, B, 3, 3], any strides. The bits are those of
// bn_relu_conv1x1 and bn_relu_conv3x3. But a band of z is read while it is in the cache. It is
// stored activated and with a border of zeros, so that the 3x3 convolution reads it in place.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <vector>

#include "conv1x1.h"
#include "conv3x3.h"
#include "prepared.h"
#include "winograd.h"

namespace dense_ext {
namespace {

// The activated z that a thread writes before it is read.
constexpr int64_t kBytesPerThread = 512 << 10;

// The sizes of a layer.
struct Shape {
  int64_t in, inner, out;  // C, B, K
};

// What the two convolutions of a layer read. The 3x3 convolution's weights are packed as taps, and
// behind them as points.
template <class T>
struct PreparedLayer {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kWeights = kTaps + (kWinograd<E> ? kPoints : 0);
  Prepared<T> conv1, conv3;
  E* points;

  PreparedLayer(A* memory, const Shape& shape)
      : conv1(memory, shape.in, shape.inner),
        conv3(conv1.end, shape.inner, shape.out, kWeights),
        points(conv3.packed + kTaps * elements<E>(shape.inner) * round_up(shape.out, kPanel<E>)) {}
  static int64_t size(const Shape& shape) {
    return Prepared<T>::size(shape.in, shape.inner) +
           Prepared<T>::size(shape.inner, shape.out, kWeights);
  }
};

// A layer's parameters and statistics.
template <class T>
struct Layer {
  Shape shape;
  FrozenNorm<Acc<T>> norm1, norm2;
  Weight<const WeightOf<T>> weight1;
  Conv3x3Weight<const WeightOf<T>> weight3;

  // `points` is whether the points of the 3x3 convolution's weights will be read.
  void prepare(const PreparedLayer<T>& to, bool points) const {
    to.conv1.set_norm(norm1, shape.in);
    to.conv3.set_norm(norm2, shape.inner);
    const TapOffsets taps = TapOffsets::in_weight(weight3, /*reversed=*/false);
    const auto b = weights_as_b(weight3, taps);
    pack_weights<WeightOf<T>>(
        {{weights_as_b(weight1, /*transposed=*/true), to.conv1.packed}, {b, to.conv3.packed}});
    if constexpr (kWinograd<Operand<T>>) {
      if (points) transform_weights(b, to.conv3.packed, to.points);
    }
  }
};

template <class T>
class FrozenBlock {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  FrozenBlock(const Pixels<T>& x, const std::vector<Shape>& shapes)
      : x_(x),
        shapes_(shapes),
        widest_(widest(shapes)),
        z_ld_(whole_vectors<E>(elements<E>(widest_.inner))),
        line_size_((x.width + 2) * z_ld_),
        lines_(x.images * x.height),
        bands_(std::min(
            lines_, ceil_div(lines_ * bytes_of<E>(line_size_), num_threads() * kBytesPerThread))),
        images_(std::min(x.images, ceil_div(ceil_div(lines_, bands_), x.height) + 1)),
        winograd_pays_(winograd_pays<E>(x.images, x.height, x.width)),
        z_taps_(TapOffsets::in_band(x.width, z_ld_)),
        workspace_{bytes_of<A>(PreparedLayer<T>::size(widest_)),
                   bytes_of<E>(images_ * (x.height + 2) * line_size_)},
        prepared_(workspace_.take<A>(PreparedLayer<T>::size(widest_))),
        z_(workspace_.take<E>(images_ * (x.height + 2) * line_size_)) {}

  // Runs layers that are prepared one by one.
  void run(const std::vector<Layer<T>>& layers) {
    clear_border();
    for (const Layer<T>& layer : layers) {
      const PreparedLayer<T> prepared(prepared_, layer.shape);
      layer.prepare(prepared, winograd_pays_);
      run(layer.shape, prepared);
    }
  }

  // Runs layers that have been prepared, one after another in memory.
  void run(A* memory) {
    clear_border();
    for (const Shape& shape : shapes_) {
      const PreparedLayer<T> prepared(memory, shape);
      run(shape, prepared);
      memory = prepared.conv3.end;
    }
  }

 private:
  static Shape widest(const std::vector<Shape>& shapes) {
    Shape widest{};
    for (const Shape& shape : shapes) {
      widest.in = std::max(widest.in, shape.in);
      widest.inner = std::max(widest.inner, shape.inner);
      widest.out = std::max(widest.out, shape.out);
    }
    return widest;
  }

  void clear_border() {
    for (int64_t i = 0; i < images_; i++) {
      E* line = z_ + i * (x_.height + 2) * line_size_;
      for (int64_t h = 0; h < x_.height + 2; h++, line += line_size_) {
        if (h == 0 || h == x_.height + 1) {
          std::fill_n(line, line_size_, E{});
        } else {
          std::fill_n(line, z_ld_, E{});
          std::fill_n(line + line_size_ - z_ld_, z_ld_, E{});
        }
      }
    }
  }

  // Winograd's algorithm has to find a layer's output finite: else the nine taps are multiplied.
  void run(const Shape& shape, const PreparedLayer<T>& prepared) {
    winograd_ = winograd_pays_;
    finite_ = true;
    run_bands(shape, prepared);
    if (finite_) return;
    winograd_ = false;
    run_bands(shape, prepared);
  }

  void run_bands(const Shape& shape, const PreparedLayer<T>& prepared) {
    int64_t written = 0;
    for (int64_t i = 0; i < bands_; i++) {
      const Range band = part_of(lines_, bands_, i);
      write_bottleneck(shape, prepared, band);
      // The last line waits for the line below it, if that is in the same image, and its tiles too.
      const int64_t row = band.end % x_.height, above = std::max<int64_t>(row - 1, 0);
      const int64_t ready = band.end - row + (winograd_ ? above / 2 * 2 : above);
      write_output(shape, prepared, {written, ready});
      written = ready;
    }
  }

  // Writes the activated z of these lines. A line is one row of one image.
  void write_bottleneck(const Shape& shape, const PreparedLayer<T>& prepared, Range lines) {
    const int64_t width = x_.width, first = lines.begin * width;
    const Pixels<const T> source = {x_.at(first), 1, lines.size(), width, shape.in, x_.stride};
    const ProductParts<E> parts(source.count(), ActivatedProduct<T>::kPixels, shape.inner,
                                num_threads());
    const Tiles& tiles = parts.tiles;
    parallel(parts.count(), [&](int64_t part) {
      const int64_t channel = parts.columns_of(part).begin, count = parts.columns_of(part).size();
      const ActivatedProduct<T> product{source, prepared.conv1.scale, prepared.conv1.shift,
                                        prepared.conv1.packed + channel * elements<E>(shape.in),
                                        count};
      const Range range = parts.tiles_of(part);
      for (int64_t i = range.begin; i < range.end; i++) {
        const Range tile = tiles.tile(i), next = i + 1 < range.end ? tiles.tile(i + 1) : Range{};
        A* z = product.run(tile, next, {});
        round_rows<T>(z, product.ld(), tile.size(), count);
        for (int64_t p = tile.begin; p < tile.end;) {
          const int64_t column = p % width, pixels = std::min(width - column, tile.end - p);
          E* line = padded_line((first + p) / width) + line_size_;
          activate_rows<Depth::kColumns>(z + (p - tile.begin) * product.ld(), product.ld(), pixels,
                                         count, prepared.conv3.scale + channel,
                                         prepared.conv3.shift + channel,
                                         line + (column + 1) * z_ld_ + elements<E>(channel), z_ld_);
          p += pixels;
        }
      }
    });
  }

  // Writes y of these lines, which are whole rows of tiles if it takes tiles.
  void write_output(const Shape& shape, const PreparedLayer<T>& prepared, Range lines) {
    const Range tiles = {first_tile(lines.begin), first_tile(lines.end)};
    const int64_t total = winograd_ ? tiles.size() : lines.size();
    const int64_t parts = std::min(total, num_threads());
    parallel(parts, [&](int64_t part) {
      const Range range = part_of(total, parts, part);
      if constexpr (kWinograd<E>) {
        if (winograd_) {
          for_tile_groups({tiles.begin + range.begin, tiles.begin + range.end},
                          [&](Range group) { write_tiles(shape, prepared, group); });
          return;
        }
      }
      write_lines(shape, prepared, {lines.begin + range.begin, lines.begin + range.end});
    });
  }

  // By nine taps.
  void write_lines(const Shape& shape, const PreparedLayer<T>& prepared, Range lines) {
    const TapOffsets packed_taps = TapOffsets::in_panel<E>(shape.inner);
    const Chunks chunks(shape.inner, kConv3x3Channels, kPanel<E>);
    const int64_t y_ld = whole_vectors<A>(shape.out);
    A* y = scratch<A>(Slot::kProduct, x_.width * y_ld);
    for (int64_t line = lines.begin; line < lines.end; line++) {
      for (int64_t c = 0; c < chunks.count; c++) {
        const int64_t first = chunks[c].begin;
        multiply(Product<E>{.rows = x_.width,
                            .columns = shape.out,
                            .depth = elements<E>(chunks[c].size()),
                            .a = padded_line(line) + elements<E>(first),
                            .a_row = z_ld_,
                            .a_depth = 1,
                            .b = prepared.conv3.packed + elements<E>(first) * kPanel<E>,
                            .b_panel = kTaps * elements<E>(shape.inner) * kPanel<E>,
                            .b_depth = kPanel<E>,
                            .c = y,
                            .c_row = y_ld,
                            .accumulate = c > 0,
                            .taps = kTaps,
                            .a_taps = z_taps_.offset,
                            .b_taps = packed_taps.offset});
      }
      store_output(shape, y, line, {0, x_.width});
    }
  }

  // By Winograd's algorithm, for a group of tiles.
  void write_tiles(const Shape& shape, const PreparedLayer<T>& prepared, Range group) {
    const Chunks chunks(shape.inner, kConv3x3Channels, kPanel<E>);
    const int64_t y_ld = whole_vectors<A>(shape.out), row_size = 2 * x_.width * y_ld;
    const int64_t row_tiles = ceil_div(x_.width, 2), first_row = group.begin / row_tiles;
    A* y = scratch<A>(Slot::kProduct, (ceil_div(group.end, row_tiles) - first_row) * row_size);
    for (int64_t c = 0; c < chunks.count; c++) {
      const int64_t first = chunks[c].begin;
      const WinogradProduct<A> product{.width = x_.width,
                                       .depth = chunks[c].size(),
                                       .columns = shape.out,
                                       .in_ld = z_ld_,
                                       .out_ld = y_ld,
                                       .b = prepared.points + first * kPanel<E>,
                                       .b_depth = shape.inner,
                                       .b_panel = kPoints * shape.inner * kPanel<E>,
                                       .accumulate = c > 0};
      const auto row = [&](int64_t i) {
        const Range lines = lines_of(i);
        return TileRow<A>{padded_line(lines.begin) + first, y + (i - first_row) * row_size,
                          lines.size()};
      };
      if (!product.write_outputs(group, product.transform_inputs(group, row), row)) finite_ = false;
    }
    for_tile_rows(x_.width, group, [&](int64_t row, Range tiles, int64_t) {
      const Range lines = lines_of(row);
      const Range pixels = {2 * tiles.begin, std::min(2 * tiles.end, x_.width)};
      const A* source = y + (row - first_row) * row_size + pixels.begin * y_ld;
      for (int64_t line = lines.begin; line < lines.end; line++, source += x_.width * y_ld) {
        store_output(shape, source, line, pixels);
      }
    });
  }

  void store_output(const Shape& shape, const A* y, int64_t line, Range pixels) {
    store_rows<T>(y, whole_vectors<A>(shape.out), pixels.size(), shape.out,
                  x_.at(line * x_.width + pixels.begin) + shape.in, x_.stride);
  }

  // The rows of tiles count on from image to image.
  int64_t image_tile_rows() const { return ceil_div(x_.height, 2); }
  int64_t first_tile(int64_t line) const {
    const int64_t row = line / x_.height * image_tile_rows() + line % x_.height / 2;
    return row * ceil_div(x_.width, 2);
  }
  Range lines_of(int64_t tile_row) const {
    const int64_t image = tile_row / image_tile_rows(), row = 2 * (tile_row % image_tile_rows());
    return {image * x_.height + row, image * x_.height + std::min(row + 2, x_.height)};
  }

  // The upper left neighbour of the first pixel of a line of z.
  E* padded_line(int64_t line) const {
    const int64_t image = line / x_.height % images_, row = line % x_.height;
    return z_ + (image * (x_.height + 2) + row) * line_size_;
  }

  const Pixels<T>& x_;
  const std::vector<Shape>& shapes_;
  const Shape widest_;  // the largest sizes of all layers
  const int64_t z_ld_, line_size_;
  const int64_t lines_, bands_;
  const int64_t images_;  // how many are in z at a time
  const bool winograd_pays_;
  bool winograd_ = false;  // whether the layer that runs takes tiles
  std::atomic<bool> finite_ = true;
  const TapOffsets z_taps_;
  Workspace workspace_;
  A* const prepared_;
  E* const z_;  // [images_][H + 2][W + 2][z_ld_]; image i is at i % images_
};

template <class T>
std::vector<Layer<T>> layers_of(int64_t in, const std::vector<Tensor>& means,
                                const std::vector<Tensor>& vars, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases, const std::vector<double>& eps,
                                const std::vector<Tensor>& convs) {
  using A = Acc<T>;
  const size_t count = convs.size();
  STD_TORCH_CHECK(count > 0 && count % 2 == 0 && means.size() == count && vars.size() == count &&
                      weights.size() == count && biases.size() == count && eps.size() == count,
                  "each layer takes two norms and two convolutions");
  const auto norm = [&](size_t i, int64_t n) {
    return FrozenNorm<A>{channels<const A>(means[i], "running mean", n),
                         channels<const A>(vars[i], "running variance", n),
                         channels<const A>(weights[i], "norm weight", n),
                         channels<const A>(biases[i], "norm bias", n), eps[i]};
  };
  std::vector<Layer<T>> layers;
  for (size_t i = 0; i < count; i += 2) {
    const int64_t inner = convs[i].size(0), out = convs[i + 1].size(0);
    layers.push_back({{in, inner, out},
                      norm(i, in),
                      norm(i + 1, inner),
                      weight_of<const WeightOf<T>>(convs[i], "weight", inner, in, 1),
                      conv3x3_weight<const WeightOf<T>>(convs[i + 1], "weight", out, inner, 4)});
    in += out;
  }
  return layers;
}

template <class T>
std::vector<Shape> shapes_of(const std::vector<Layer<T>>& layers) {
  std::vector<Shape> shapes;
  for (const Layer<T>& layer : layers) shapes.push_back(layer.shape);
  return shapes;
}

// What the layers take in PackedMemory.
template <class T>
int64_t size_of(const std::vector<Shape>& shapes) {
  int64_t size = 0;
  for (const Shape& shape : shapes) size += PreparedLayer<T>::size(shape);
  return size;
}

// Checks that x holds images, whose channels the layers fill.
void check_input(const Tensor& x, const Shape& last) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, H, W, C], got ", shape_of(x));
  STD_TORCH_CHECK(x.size(3) == last.in + last.out, "x has ", x.size(3), " channels, expected ",
                  last.in + last.out);
}

void frozen_block_forward(const Tensor& x, int64_t in_channels, std::vector<Tensor> means,
                          std::vector<Tensor> vars, std::vector<Tensor> weights,
                          std::vector<Tensor> biases, std::vector<double> eps,
                          std::vector<Tensor> convs) {
  STD_TORCH_CHECK(!convs.empty(), "a block has at least one layer");
  dispatch(x, convs[0], [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<T>(x, "x");
    const auto layers = layers_of<T>(in_channels, means, vars, weights, biases, eps, convs);
    const std::vector<Shape> shapes = shapes_of(layers);
    check_input(x, shapes.back());
    if (xs.count() > 0) FrozenBlock<T>(xs, shapes).run(layers);
  });
}

void pack_frozen_block(const Tensor& packed, int64_t in_channels, std::vector<Tensor> means,
                       std::vector<Tensor> vars, std::vector<Tensor> weights,
                       std::vector<Tensor> biases, std::vector<double> eps,
                       std::vector<Tensor> convs) {
  STD_TORCH_CHECK(!convs.empty(), "a block has at least one layer");
  dispatch(convs[0], [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto layers = layers_of<T>(in_channels, means, vars, weights, biases, eps, convs);
    Acc<T>* memory = PackedMemory<T>(packed, size_of<T>(shapes_of(layers))).to_write();
    for (const Layer<T>& layer : layers) {
      const PreparedLayer<T> prepared(memory, layer.shape);
      layer.prepare(prepared, /*points=*/true);
      memory = prepared.conv3.end;
    }
  });
}

// X [N, Ct, H, W] in channels_last memory, from x [N, c0, H, W] in any.
Tensor packed_dense_block(const Tensor& x, const Tensor& packed, std::vector<int64_t> widths,
                          std::vector<int64_t> growth) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  STD_TORCH_CHECK(!widths.empty() && widths.size() == growth.size(), "each layer has two sizes");
  Tensor out;
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::vector<Shape> shapes;
    int64_t in = x.size(1);
    for (size_t i = 0; i < widths.size(); i++) {
      shapes.push_back({in, widths[i], growth[i]});
      in += growth[i];
    }
    Acc<T>* memory = PackedMemory<T>(packed, size_of<T>(shapes)).to_read();
    out = torch::stable::empty({x.size(0), x.size(2), x.size(3), in}, kScalarType<T>);
    Tensor first = torch::stable::narrow(out, 3, 0, x.size(1));
    torch::stable::copy_(first, nhwc(x));
    const auto xs = pixels<T>(out, "x");
    if (xs.count() > 0) FrozenBlock<T>(xs, shapes).run(memory);
  });
  return nchw(out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("frozen_block_forward", TORCH_BOX(&frozen_block_forward));
  m.impl("pack_frozen_block", TORCH_BOX(&pack_frozen_block));
  m.impl("packed_dense_block", TORCH_BOX(&packed_dense_block));
}

}  // namespace dense_ext
