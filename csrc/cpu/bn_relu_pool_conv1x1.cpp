// Forward:  y = avg_pool2x2(relu(scale*x + shift)) @ W^T
// Backward: dp = (grad @ W) / 4, the gradient of each pixel of a pooling window
//           g = dp where scale*x + shift > 0, else 0;  grad_x = scale*g
//           sums = [sum g, sum g*(x - mean)];  dW = grad^T @ avg_pool2x2(relu(scale*x + shift))
//
// x, grad_x [N, H, W, C]; y, grad [N, H/2, W/2, K]; each with its own pixel stride. W, dW [K, C],
// any strides. Moves 4 C + K elements per output pixel forward, 8 C + K backward. The pool and the
// product commute; after pooling in scratch, the product takes a quarter of the work. Volumes
// [N, D, H, W, C] are pooled over 2x2x2 windows.

#include <torch/csrc/stable/library.h>

#include "conv1x1.h"
#include "prepared.h"

namespace dense_ext {
namespace {

// The output pixels of a tile, and the channels that are pooled at a time.
constexpr int64_t kPixels = 112;
constexpr int64_t kForwardChannels = 256;
constexpr int64_t kBackwardChannels = 128;

// The shape of the pooled x [N, H/2, W/2, channels], or [N, D/2, H/2, W/2, channels].
template <class T>
Volumes<T> pooled_shape(const Volumes<const T>& x, bool volumes, int64_t channels) {
  const int64_t planes = volumes ? x.planes / 2 : x.planes;
  const int64_t images = x.planes > 0 ? x.images / x.planes * planes : 0;
  return {{nullptr, images, x.height / 2, x.width / 2, channels, 0}, planes};
}

// The pooling windows. The first input pixel of output pixel p's window is first_input(p); the
// others of the same plane are 1, `width` and `width` + 1 further. A window has `depth` planes,
// which are `plane` pixels apart.
struct Windows {
  int64_t planes, height, width, depth;
  int64_t plane = height * width;
  int64_t out_planes = planes / depth, out_height = height / 2, out_width = width / 2;

  int64_t first_input(int64_t p) const {
    const int64_t line = p / out_width, image = line / out_height;  // counted over all volumes
    const int64_t in_image = image / out_planes * planes + image % out_planes * depth;
    return (in_image * height + line % out_height * 2) * width + p % out_width * 2;
  }

  // The range of input pixels from the first to the last that the output pixels `tile` read.
  Range inputs(Range tile) const {
    return {first_input(tile.begin), first_input(tile.end - 1) + (depth - 1) * plane + width + 2};
  }
};

// out[i] = factor * sum of relu(scale*x + shift) over the window of output pixel tile.begin + i
template <Depth kDepth, class T>
void pool_rows(const Pixels<const T>& x, const Windows& windows, Range tile, Range chunk,
               const Acc<T>* scale, const Acc<T>* shift, Acc<T> factor, Operand<T>* out,
               int64_t ld) {
  using V = Vector<T>;
  const int64_t below = x.width * x.stride, behind = windows.plane * x.stride;
  write_operand<kDepth, T>(
      tile.size(), chunk.size(), out, ld, [&](int64_t r, int64_t j, auto count) {
        const V s = load(scale + chunk.begin + j), t = load(shift + chunk.begin + j);
        const T* corner = x.at(windows.first_input(tile.begin + r)) + chunk.begin + j;
        V sum = {};
        for (int64_t d = 0; d < windows.depth; d++, corner += behind) {
          const T* low = corner + below;
          const V upper =
              relu(s * load(corner, count) + t) + relu(s * load(corner + x.stride, count) + t);
          sum +=
              upper + (relu(s * load(low, count) + t) + relu(s * load(low + x.stride, count) + t));
        }
        return sum * factor;
      });
}

template <class T>
class Forward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  // x [N, H, W, C], y [N, H/2, W/2, K]; `depth` planes are in a pooling window. The vectors are
  // padded.
  Forward(const Volumes<const T>& x, int64_t depth, const A* scale, const A* shift, const E* packed,
          const Pixels<T>& y)
      : x_(x),
        scale_(scale),
        shift_(shift),
        packed_(packed),
        y_(y),
        windows_{x.planes, x.height, x.width, depth},
        parts_(y.count(), kPixels, y.channels, num_threads()),
        chunks_(x.channels, kForwardChannels, kPanel<E>) {}

  void run() {
    parallel(parts_.count(), [&](int64_t part) { run_part(part); });
  }

 private:
  void run_part(int64_t part) {
    const int64_t a_ld = leading_dimension<E>(elements<E>(chunks_.size));
    const Range out = parts_.columns_of(part);
    const int64_t y_ld = leading_dimension<A>(out.size());
    E* a = scratch<E>(Slot::kActivation, kPixels * a_ld);
    A* y = scratch<A>(Slot::kProduct, kPixels * y_ld);
    const E* packed = packed_ + out.begin * elements<E>(x_.channels);
    const Range range = parts_.tiles_of(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = parts_.tiles.tile(i);
      for (int64_t c = 0; c < chunks_.count; c++) {
        const Range chunk = chunks_[c];
        pool_rows<Depth::kColumns>(x_, windows_, tile, chunk, scale_, shift_,
                                   A{0.25} / static_cast<A>(windows_.depth), a, a_ld);
        multiply(Product<E>{.rows = tile.size(),
                            .columns = out.size(),
                            .depth = elements<E>(chunk.size()),
                            .a = a,
                            .a_row = a_ld,
                            .a_depth = 1,
                            .b = packed + elements<E>(chunk.begin) * kPanel<E>,
                            .b_panel = elements<E>(x_.channels) * kPanel<E>,
                            .b_depth = kPanel<E>,
                            .c = y,
                            .c_row = y_ld,
                            .accumulate = c > 0,
                            .prefetch = {next_input(i, c, range.end)}});
      }
      store_rows(y, y_ld, tile.size(), out.size(), y_.at(tile.begin) + out.begin, y_.stride);
    }
  }

  // The input that is pooled after chunk c of tile i.
  Prefetch next_input(int64_t i, int64_t c, int64_t end) const {
    const int64_t next = c + 1 < chunks_.count ? i : i + 1;
    if (next == end) return {};
    return fetch_pixels(x_, windows_.inputs(parts_.tiles.tile(next)),
                        chunks_[(c + 1) % chunks_.count]);
  }

  const Volumes<const T>& x_;
  const A *const scale_, *const shift_;
  const E* const packed_;
  const Pixels<T>& y_;
  const Windows windows_;
  const ProductParts<E> parts_;
  const Chunks chunks_;
};

void bn_relu_pool_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const Tensor& weight, const Tensor& y) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    using E = Operand<T>;
    const auto xs = volumes<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    const A* scales = channels<const A>(scale, "scale", in);
    const A* shifts = channels<const A>(shift, "shift", in);
    const auto weights =
        weights_as_b(weight_of<const T>(weight, "weight", out, in, 1), /*transposed=*/true);
    const auto ys = volumes<T>(y, "y", pooled_shape<T>(xs, x.dim() == 5, out), out);
    if (ys.count() == 0) return;
    Workspace workspace{bytes_of<E>(weights.packed_size()), 2 * padded_bytes<A>(in)};
    E* packed = workspace.take<E>(weights.packed_size());
    pack_weights(weights, packed);
    const A* padded_scale = workspace.take_padded(scales, in);
    const A* padded_shift = workspace.take_padded(shifts, in);
    Forward<T>(xs, x.dim() - 3, padded_scale, padded_shift, packed, ys).run();
  });
}

void pack_frozen_transition(const Tensor& packed, const Tensor& mean, const Tensor& var,
                            const Tensor& weight, const Tensor& bias, double eps,
                            const Tensor& conv) {
  dispatch(conv, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t in = conv.size(1), out = conv.size(0);
    const FrozenNorm<A> norm{channels<const A>(mean, "running mean", in),
                             channels<const A>(var, "running variance", in),
                             channels<const A>(weight, "norm weight", in),
                             channels<const A>(bias, "norm bias", in), eps};
    const auto weights = weight_of<const T>(conv, "weight", out, in, 1);
    const PackedMemory<T> memory(packed, Prepared<T>::size(in, out));
    const Prepared<T> prepared(memory.to_write(), in, out);
    prepared.set_norm(norm, in);
    pack_weights(weights_as_b(weights, /*transposed=*/true), prepared.packed);
  });
}

// y [N, K, H/2, W/2] in channels_last memory, from x [N, C, H, W] in any; the same of volumes.
Tensor packed_transition(const Tensor& x, const Tensor& packed, int64_t out_channels) {
  Tensor y;
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor input = torch::stable::contiguous(nhwc(x));
    const auto xs = volumes<const T>(input, "x");
    const PackedMemory<T> memory(packed, Prepared<T>::size(xs.channels, out_channels));
    const Prepared<T> prepared(memory.to_read(), xs.channels, out_channels);
    std::vector<int64_t> size{x.size(0)};
    for (int64_t d = 2; d < x.dim(); d++) {
      STD_TORCH_CHECK(x.size(d) >= 2, "a transition takes at least 2 pixels per side, got ",
                      x.size(d));
      size.push_back(x.size(d) / 2);
    }
    size.push_back(out_channels);
    y = torch::stable::empty(size, kScalarType<T>);
    const auto ys =
        volumes<T>(y, "y", pooled_shape<T>(xs, x.dim() == 5, out_channels), out_channels);
    if (ys.count() == 0) return;
    Forward<T>(xs, x.dim() - 3, prepared.scale, prepared.shift, prepared.packed, ys).run();
  });
  return nchw(y);
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pixels<const T> grad;           // [N, H/2, W/2, K]
  Volumes<const T> x;             // [N, H, W, C]
  int64_t depth;                  // of a pooling window
  const A *mean, *scale, *shift;  // [C]
  Weight<const T> weight;         // [K, C]
  Pixels<T> grad_x;               // [N, H, W, C]
  A* sums;                        // [2, C]
  Weight<T> grad_weight;          // [K, C]; data null if unwanted
};

template <class T>
class Backward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  explicit Backward(const BackwardArguments<T>& args)
      : args_(args),
        in_(args.x.channels),
        out_(args.grad.channels),
        weights_(weights_as_b(args.weight, /*transposed=*/false)),
        windows_{args.x.planes, args.x.height, args.x.width, args.depth},
        chunks_(in_, kBackwardChannels, kPanel<E>),
        grid_(args.grad.count(), in_, chunks_.count, num_threads()),
        tiles_(args.grad.count(), kPixels, grid_.pixel_parts),
        dw_(args.grad_weight, grid_.pixel_parts),
        workspace_{bytes_of<E>(weights_.packed_size()), dw_.bytes(),
                   ChannelSums::bytes(grid_.pixel_parts, in_), 3 * padded_bytes<A>(in_),
                   bytes_of<A>(chunks_.size)},
        packed_(workspace_.take<E>(weights_.packed_size())),
        sums_(workspace_, grid_.pixel_parts, in_),
        mean_(workspace_.take_padded(args.mean, in_)),
        scale_(workspace_.take_padded(args.scale, in_)),
        shift_(workspace_.take_padded(args.shift, in_)),
        zeros_(workspace_.take<A>(chunks_.size)) {
    std::fill_n(zeros_, chunks_.size, A{0});
    dw_.take(workspace_);
  }

  void run() {
    pack_weights(weights_, packed_);
    for (int64_t part = 0; part < grid_.pixel_parts; part++) sums_.clear(part);
    parallel(grid_.count(), [&](int64_t thread) { run_thread(thread); });
    sums_.finish(args_.sums);
    if (dw_.wanted()) dw_.finish();
  }

 private:
  // A thread's work: a tile of output pixels in scratch, and the part of the results it adds to.
  struct Tile {
    int64_t part, dy_ld, dy_rows_ld, a_ld;
    // dy is grad divided by the size of a window; its depth is the columns, and the rows.
    E *dy = nullptr, *dy_rows = nullptr;
    E* a = nullptr;
    A* dp = nullptr;
    Range pixels = {};
    bool first = false;  // the part's first tile, which initialises its weight gradient
  };

  void run_thread(int64_t thread) {
    Tile tile{.part = thread / grid_.channel_parts,
              .dy_ld = leading_dimension<E>(elements<E>(out_)),
              .dy_rows_ld = leading_dimension<E>(out_),
              .a_ld = leading_dimension<A>(chunks_.size)};
    tile.dy = scratch<E>(Slot::kGradient, kPixels * tile.dy_ld);
    tile.dy_rows = rows_operand(tile.dy, elements<E>(kPixels) * tile.dy_rows_ld);
    tile.a = scratch<E>(Slot::kActivation, elements<E>(kPixels) * tile.a_ld);
    tile.dp = scratch<A>(Slot::kProduct, kPixels * tile.a_ld);
    const Range chunks = part_of(chunks_.count, grid_.channel_parts, thread % grid_.channel_parts);
    const Range tiles = tiles_.of_part(tile.part);
    for (int64_t i = tiles.begin; i < tiles.end; i++) {
      tile.pixels = tiles_.tile(i);
      tile.first = i == tiles.begin;
      scale_rows(args_.grad.at(tile.pixels.begin), args_.grad.stride, tile.pixels.size(), out_,
                 A{0.25} / static_cast<A>(windows_.depth), tile.dy, tile.dy_ld);
      if (dw_.wanted()) {
        pair_rows(tile.dy, tile.dy_ld, tile.pixels.size(), out_, 2, tile.dy_rows, tile.dy_rows_ld);
      }
      for (int64_t c = chunks.begin; c < chunks.end; c++) {
        write_data_gradient(tile, chunks_[c]);
        if (dw_.wanted()) add_weight_gradient(tile, chunks_[c]);
      }
    }
  }

  // Computes dp = dy @ W, and from it grad_x and sums, one output line at a time.
  void write_data_gradient(const Tile& tile, Range chunk) {
    const Range inputs = windows_.inputs(tile.pixels);
    multiply(Product<E>{.rows = tile.pixels.size(),
                        .columns = chunk.size(),
                        .depth = elements<E>(out_),
                        .a = tile.dy,
                        .a_row = tile.dy_ld,
                        .a_depth = 1,
                        .b = packed_ + chunk.begin * elements<E>(out_),
                        .b_panel = weights_.tap_stride(),
                        .b_depth = kPanel<E>,
                        .c = tile.dp,
                        .c_row = tile.a_ld,
                        .prefetch = {fetch_pixels(args_.x, inputs, chunk),
                                     fetch_pixels(args_.grad_x, inputs, chunk)}});
    const int64_t width = windows_.out_width;
    for (int64_t p = tile.pixels.begin, count; p < tile.pixels.end; p += count) {
      count = std::min(tile.pixels.end - p, width - p % width);
      spread_line(tile, chunk, p, count);
    }
  }

  // Handles the pixels of the windows of output pixels [p, p + count) of one line, and the odd
  // column, row and plane after the last window.
  void spread_line(const Tile& tile, Range chunk, int64_t p, int64_t count) {
    const A* dp = tile.dp + (p - tile.pixels.begin) * tile.a_ld;
    const int64_t next = p + count, width = windows_.width, plane = windows_.plane;
    const bool ends_line = next % windows_.out_width == 0;
    const bool ends_image = next % (windows_.out_width * windows_.out_height) == 0;
    int64_t first = windows_.first_input(p);
    for (int64_t d = 0; d < windows_.depth; d++, first += plane) {
      for (int64_t pixel : {first, first + width}) {
        mask<2>(tile, chunk, dp, tile.a_ld, pixel, 2 * count);
        if (ends_line && width % 2) mask<1>(tile, chunk, zeros_, 0, pixel + 2 * count, 1);
      }
      if (ends_image && windows_.height % 2) {
        mask<1>(tile, chunk, zeros_, 0, (first / width + 2) * width, width);
      }
    }
    const int64_t image = (next - 1) / (windows_.out_width * windows_.out_height);
    if (ends_image && (image + 1) % windows_.out_planes == 0 && windows_.planes % windows_.depth) {
      mask<1>(tile, chunk, zeros_, 0, first / plane * plane, plane);
    }
  }

  // Computes grad_x and sums of `rows` pixels from `pixel` on; kShared of them share a row of dp.
  template <int kShared>
  void mask(const Tile& tile, Range chunk, const A* dp, int64_t ld, int64_t pixel, int64_t rows) {
    const int64_t c = chunk.begin;
    mask_rows<Output::kWriteScaled, kShared>(dp, ld, args_.x.at(pixel) + c, args_.x.stride, rows,
                                             chunk.size(), mean_ + c, scale_ + c, shift_ + c,
                                             args_.grad_x.at(pixel) + c, args_.grad_x.stride,
                                             sums_.row(tile.part) + c, sums_.ld());
  }

  // dW (+)= dy^T @ (the windows' sums)
  void add_weight_gradient(const Tile& tile, Range chunk) {
    pool_rows<Depth::kRows>(args_.x, windows_, tile.pixels, chunk, scale_, shift_, A{1}, tile.a,
                            tile.a_ld);
    multiply(Product<E>{.rows = out_,
                        .columns = chunk.size(),
                        .depth = elements<E>(tile.pixels.size()),
                        .a = tile.dy_rows,
                        .a_row = 1,
                        .a_depth = tile.dy_rows_ld,
                        .b = tile.a,
                        .b_panel = kPanel<E>,
                        .b_depth = tile.a_ld,
                        .c = dw_.part(tile.part) + chunk.begin,
                        .c_row = dw_.ld(),
                        .accumulate = !tile.first});
  }

  const BackwardArguments<T>& args_;
  const int64_t in_, out_;
  const WeightsAsB<T> weights_;  // [out][in]
  const Windows windows_;
  const Chunks chunks_;
  const Grid grid_;
  const Tiles tiles_;
  Conv1x1WeightGradient<T> dw_;
  Workspace workspace_;
  E* const packed_;
  ChannelSums sums_;
  const A *const mean_, *const scale_, *const shift_;
  A* const zeros_;
};

void bn_relu_pool_conv1x1_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                   const Tensor& scale, const Tensor& shift, const Tensor& weight,
                                   const Tensor& grad_x, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = volumes<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    const BackwardArguments<T> args{
        .grad = volumes<const T>(grad, "grad", pooled_shape<T>(xs, x.dim() == 5, out), out),
        .x = xs,
        .depth = x.dim() - 3,
        .mean = channels<const A>(mean, "mean", in),
        .scale = channels<const A>(scale, "scale", in),
        .shift = channels<const A>(shift, "shift", in),
        .weight = weight_of<const T>(weight, "weight", out, in, 1),
        .grad_x = volumes<T>(grad_x, "grad_x", xs, in),
        .sums = channels<A>(sums, "sums", 2 * in),
        .grad_weight = weight_of<T>(grad_weight, "grad_weight", out, in, 1)};
    if (args.grad.count() == 0) {  // no images, or images too small for a window
      torch::stable::fill_(grad_x, 0);
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    Backward<T>(args).run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_relu_pool_conv1x1_forward", TORCH_BOX(&bn_relu_pool_conv1x1_forward));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&bn_relu_pool_conv1x1_backward));
  m.impl("pack_frozen_transition", TORCH_BOX(&pack_frozen_transition));
  m.impl("packed_transition", TORCH_BOX(&packed_transition));
}

}  // namespace dense_ext
