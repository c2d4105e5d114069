// Forward:  y = avg_pool2x2(relu(scale*x + shift)) @ W^T
// Backward: dp = (grad @ W) / 4, the gradient of each pixel of a pooling window
//           g = dp where scale*x + shift > 0, else 0;  grad_x = scale*g
//           sums = [sum g, sum g*(x - mean)];  dW = grad^T @ avg_pool2x2(relu(scale*x + shift))
//
// x, grad_x [N, H, W, C], y, grad [N, H/2, W/2, K], pixels their own strides apart; W, dW [K, C],
// any strides. Moves 4 C + K elements an output pixel forward, 8 C + K backward. The pool and the
// product commute: pooled in scratch first, the product is a quarter of the work.

#include <torch/csrc/stable/library.h>

#include "conv1x1.h"

namespace dense_ext {
namespace {

// Output pixels of a tile, and channels pooled at a time.
constexpr int64_t kPixels = 112;
constexpr int64_t kForwardChannels = 256;
constexpr int64_t kBackwardChannels = 128;

// Output pixel p's window: its first input pixel is first_input(p), the others are 1, `width` and
// `width` + 1 further.
struct Windows {
  int64_t height, width, out_height, out_width;

  int64_t first_input(int64_t p) const {
    const int64_t line = p / out_width;  // of all images' output lines
    return (line / out_height * height + line % out_height * 2) * width + p % out_width * 2;
  }

  // The input pixels of output pixels [tile), and what lies between them.
  Range inputs(Range tile) const {
    return {first_input(tile.begin), first_input(tile.end - 1) + width + 2};
  }
};

template <class T>
Windows windows_of(const Pixels<const T>& x) {
  return {x.height, x.width, x.height / 2, x.width / 2};
}

// out[i] = factor * sum of relu(scale*x + shift) over the window of output pixel pixels.begin + i
template <class T>
void pool_rows(const Pixels<const T>& x, const Windows& windows, Range tile, Range chunk,
               const Acc<T>* scale, const Acc<T>* shift, Acc<T> factor, Acc<T>* out, int64_t ld) {
  using V = Vector<T>;
  const int64_t below = x.width * x.stride;
  for (int64_t p = tile.begin; p < tile.end; p++, out += ld) {
    const T* window = x.at(windows.first_input(p)) + chunk.begin;
    for_vectors<T>(chunk.size(), [&](int64_t j, auto count) {
      const V s = load(scale + chunk.begin + j), t = load(shift + chunk.begin + j);
      const T* corner = window + j;
      const V top =
          relu(s * load(corner, count) + t) + relu(s * load(corner + x.stride, count) + t);
      corner += below;
      const V low =
          relu(s * load(corner, count) + t) + relu(s * load(corner + x.stride, count) + t);
      store(out + j, (top + low) * factor);
    });
  }
}

template <class T>
void forward_kernel(const Pixels<const T>& x, const Acc<T>* scale_, const Acc<T>* shift_,
                    const Weight<const T>& weight, const Pixels<T>& y) {
  using A = Acc<T>;
  const int64_t in = x.channels, out = y.channels;
  const WeightsAsB<T> b{weight.data, 1, in, out, weight.in_stride, weight.out_stride, kOneTap};
  const Tiles tiles(y.count(), kPixels, num_threads());
  const Chunks chunks(in, kForwardChannels, kPanel<A>);
  const Windows windows = windows_of(x);
  Workspace workspace{bytes_of<A>(b.packed_size()), padded_bytes<A>(in), padded_bytes<A>(in)};
  A* packed = workspace.take<A>(b.packed_size());
  const A* scale = workspace.take_padded(scale_, in);
  const A* shift = workspace.take_padded(shift_, in);
  pack_weights(b, packed);

  parallel(tiles.parts, [&](int64_t part) {
    const int64_t a_ld = leading_dimension<A>(chunks.size), y_ld = leading_dimension<A>(out);
    A* a = scratch<A>(Slot::kActivation, kPixels * a_ld);
    A* ys = scratch<A>(Slot::kProduct, kPixels * y_ld);
    const Range range = tiles.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles.tile(i);
      for (int64_t c = 0; c < chunks.count; c++) {
        const Range chunk = chunks[c];
        pool_rows(x, windows, tile, chunk, scale, shift, A{0.25}, a, a_ld);
        Product<A> product{
            tile.size(),    out,       chunk.size(), a,   a_ld, 1, packed + chunk.begin * kPanel<A>,
            in * kPanel<A>, kPanel<A>, ys,           y_ld};
        product.accumulate = c > 0;
        if (c + 1 < chunks.count) {
          product.prefetch[0] = fetch_pixels(x, windows.inputs(tile), chunks[c + 1]);
        } else if (i + 1 < range.end) {
          product.prefetch[0] = fetch_pixels(x, windows.inputs(tiles.tile(i + 1)), chunks[0]);
        }
        multiply(product);
      }
      store_rows(ys, y_ld, tile.size(), out, y.at(tile.begin), y.stride);
    }
  });
}

void bn_relu_pool_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const Tensor& weight, const Tensor& y) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const Pixels<T> pooled{nullptr, xs.images, xs.height / 2, xs.width / 2, 0, 0};
    const auto ys = pixels<T>(y, "y", pooled, weight.size(0));
    const auto* scales = channels<const Acc<T>>(scale, "scale", xs.channels);
    const auto* shifts = channels<const Acc<T>>(shift, "shift", xs.channels);
    const auto weights = weight_of<const T>(weight, "weight", ys.channels, xs.channels, 1);
    if (y.numel() > 0) forward_kernel<T>(xs, scales, shifts, weights, ys);
  });
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pixels<const T> grad, x;
  const A *mean, *scale, *shift;
  Weight<const T> weight;
  Pixels<T> grad_x;
  A* sums;
  Weight<T> grad_weight;  // data null: not wanted
};

// From dp to g, grad_x and sums, in the windows of a tile; the vectors are padded.
template <class T>
struct Spread {
  using A = Acc<T>;
  const Pixels<const T>& x;
  const Pixels<T>& grad_x;
  const A *mean, *scale, *shift;
  const A* zeros;
  double* sums;
  int64_t sums_ld;

  // `rows` pixels from `pixel` on; kShared of them share a row of dp.
  template <int kShared>
  void mask(const A* dp, int64_t ld, int64_t pixel, int64_t rows, Range chunk) const {
    const int64_t c = chunk.begin;
    mask_rows<Output::kWriteScaled, kShared>(dp, ld, x.at(pixel) + c, x.stride, rows, chunk.size(),
                                             mean + c, scale + c, shift + c, grad_x.at(pixel) + c,
                                             grad_x.stride, sums + c, sums_ld);
  }

  // All pixels of the windows of output pixels [p, p + count), which lie in one line, and the odd
  // column and row beyond the last window.
  void line(const A* dp, int64_t ld, const Windows& windows, int64_t p, int64_t count,
            Range chunk) const {
    const int64_t first = windows.first_input(p);
    const bool ends_line = p % windows.out_width + count == windows.out_width;
    for (int64_t row = 0; row < 2; row++) {
      const int64_t pixel = first + row * windows.width;
      mask<2>(dp, ld, pixel, 2 * count, chunk);
      if (ends_line && windows.width % 2) mask<1>(zeros, 0, pixel + 2 * count, 1, chunk);
    }
    const bool ends_image =
        ends_line && p / windows.out_width % windows.out_height == windows.out_height - 1;
    if (ends_image && windows.height % 2) {
      const int64_t last_line = (first / windows.width + 2) * windows.width;
      mask<1>(zeros, 0, last_line, windows.width, chunk);
    }
  }

  void tile(const A* dp, int64_t ld, const Windows& windows, Range tile, Range chunk) const {
    for (int64_t p = tile.begin; p < tile.end;) {
      const int64_t count = std::min(tile.end - p, windows.out_width - p % windows.out_width);
      line(dp + (p - tile.begin) * ld, ld, windows, p, count, chunk);
      p += count;
    }
  }
};

template <class T>
void backward_kernel(const BackwardArguments<T>& args) {
  using A = Acc<T>;
  const int64_t in = args.x.channels, out = args.grad.channels, count = args.grad.count();
  const WeightsAsB<T> b{args.weight.data,      1,      out, in, args.weight.out_stride,
                        args.weight.in_stride, kOneTap};
  const Chunks chunks(in, kBackwardChannels, kPanel<A>);
  const Grid grid(count, in, chunks.count, num_threads());
  const Tiles tiles(count, kPixels, grid.pixel_parts);
  const Windows windows = windows_of(args.x);
  const bool want_weight = args.grad_weight.data != nullptr;
  const int64_t dw_ld = round_up(in, kPanel<A>), dw_size = want_weight ? out * dw_ld : 0;
  Workspace workspace{bytes_of<A>(b.packed_size()),
                      bytes_of<A>(grid.pixel_parts * dw_size),
                      ChannelSums::bytes(grid.pixel_parts, in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(chunks.size)};
  A* packed = workspace.take<A>(b.packed_size());
  A* dw = workspace.take<A>(grid.pixel_parts * dw_size);
  ChannelSums sums(workspace, grid.pixel_parts, in);
  const A* mean = workspace.take_padded(args.mean, in);
  const A* scale = workspace.take_padded(args.scale, in);
  const A* shift = workspace.take_padded(args.shift, in);
  A* zeros = workspace.take<A>(chunks.size);
  std::fill_n(zeros, chunks.size, A{0});
  pack_weights(b, packed);
  for (int64_t p = 0; p < grid.pixel_parts; p++) sums.clear(p);

  parallel(grid.count(), [&](int64_t thread) {
    const int64_t part = thread / grid.channel_parts;
    const Range my_chunks = part_of(chunks.count, grid.channel_parts, thread % grid.channel_parts);
    const int64_t dy_ld = leading_dimension<A>(out), a_ld = leading_dimension<A>(chunks.size);
    A* dy = scratch<A>(Slot::kGradient, kPixels * dy_ld);
    A* a = scratch<A>(Slot::kActivation, kPixels * a_ld);
    A* dp = scratch<A>(Slot::kProduct, kPixels * a_ld);
    const Spread<T> spread{args.x, args.grad_x, mean,           scale,
                           shift,  zeros,       sums.row(part), sums.ld()};
    const Range range = tiles.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles.tile(i);
      scale_rows(args.grad.at(tile.begin), args.grad.stride, tile.size(), out, A{0.25}, dy, dy_ld);
      for (int64_t c = my_chunks.begin; c < my_chunks.end; c++) {
        const Range chunk = chunks[c];
        Product<A> product{
            tile.size(),     chunk.size(), out, dy,  dy_ld, 1, packed + chunk.begin * out,
            out * kPanel<A>, kPanel<A>,    dp,  a_ld};
        product.prefetch[0] = fetch_pixels(args.x, windows.inputs(tile), chunk);
        product.prefetch[1] = fetch_pixels(args.grad_x, windows.inputs(tile), chunk);
        multiply(product);
        spread.tile(dp, a_ld, windows, tile, chunk);
        if (!want_weight) continue;
        pool_rows(args.x, windows, tile, chunk, scale, shift, A{1}, a, a_ld);
        Product<A> weight{out,         chunk.size(),
                          tile.size(), dy,
                          1,           dy_ld,
                          a,           kPanel<A>,
                          a_ld,        dw + part * dw_size + chunk.begin,
                          dw_ld};
        weight.accumulate = i > range.begin;
        multiply(weight);
      }
    }
  });
  sums.finish(args.sums);
  if (want_weight) write_grad_weight(dw, grid.pixel_parts, dw_ld, args.grad_weight);
}

void bn_relu_pool_conv1x1_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                   const Tensor& scale, const Tensor& shift, const Tensor& weight,
                                   const Tensor& grad_x, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    const Pixels<T> pooled{nullptr, xs.images, xs.height / 2, xs.width / 2, 0, 0};
    const BackwardArguments<T> args{pixels<const T>(grad, "grad", pooled, out),
                                    xs,
                                    channels<const A>(mean, "mean", in),
                                    channels<const A>(scale, "scale", in),
                                    channels<const A>(shift, "shift", in),
                                    weight_of<const T>(weight, "weight", out, in, 1),
                                    pixels<T>(grad_x, "grad_x", xs, in),
                                    channels<A>(sums, "sums", 2 * in),
                                    weight_of<T>(grad_weight, "grad_weight", out, in, 1)};
    if (args.grad.count() == 0) {  // no image, or no room for a window
      torch::stable::fill_(grad_x, 0);
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    backward_kernel(args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_ext, CPU, m) {
  m.impl("bn_relu_pool_conv1x1_forward", TORCH_BOX(&bn_relu_pool_conv1x1_forward));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&bn_relu_pool_conv1x1_backward));
}

}  // namespace dense_ext
