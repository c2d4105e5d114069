// Forward:  y = conv3x3(relu(scale*z + shift), W), padded with zeros after the activation, and
//           y's mean and variance.
// Backward: dy = grad + u*y + v
//           g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0;  grad_bn = g
//           sums = [sum g, sum g*(z - mean)];  dW[k, c, tap] = sum_p dy[p, k] * a[p + tap, c]
//
// z, grad_bn [N, H, W, B], y, grad [N, H, W, K], pixels their own strides apart; W, dW
// [K, B, 3, 3], any strides. Moves B + K elements a pixel forward, 2 B + 2 K backward: a band of
// rows is activated once into scratch with a border of zeros, and the nine taps are nine shifted
// views of it.

#include <torch/csrc/stable/library.h>

#include "bands.h"
#include "reduce.h"

namespace dense_ext {
namespace {

constexpr int64_t kTaps = 9;

// Scratch of a band, channels activated at a time, and pixels a weight gradient sums at a time (so
// that the operands of its product stay in the L1 cache).
constexpr int64_t kBandBytes = 256 << 10;
constexpr int64_t kChannels = 128;
constexpr int64_t kWeightPixels = 128;

template <class A>
int64_t leading_dimension(int64_t columns) {
  return round_up(columns, kLanes<A>);
}

// Offsets of the nine taps from a padded line, of pixels `ld` apart.
struct TapOffsets {
  int64_t offset[kTaps];

  TapOffsets(int64_t width, int64_t ld) {
    for (int64_t t = 0; t < kTaps; t++) offset[t] = (t / 3 * (width + 2) + t % 3) * ld;
  }
};

// Taps of packed weights, each [depth][kPanel].
template <class A>
struct PackedTaps {
  int64_t offset[kTaps];

  explicit PackedTaps(int64_t depth) {
    for (int64_t t = 0; t < kTaps; t++) offset[t] = t * depth * kPanel<A>;
  }
};

template <class T>
struct ForwardArguments {
  using A = Acc<T>;
  Pixels<const T> z;
  const A *scale, *shift;
  Weight<const T> weight;
  Pixels<T> y;
  A *mean, *var;  // null: not wanted
};

template <class T>
void forward_kernel(const ForwardArguments<T>& args) {
  using A = Acc<T>;
  const Pixels<const T>& z = args.z;
  const int64_t in = z.channels, out = args.y.channels;
  int64_t weight_taps[kTaps];
  for (int64_t t = 0; t < kTaps; t++) weight_taps[t] = args.weight.tap_offset(t);
  const WeightsAsB<T> b{args.weight.data,       kTaps,      in, out, args.weight.in_stride,
                        args.weight.out_stride, weight_taps};
  const Chunks chunks(in, kChannels, kPanel<A>);
  const int64_t a_ld = leading_dimension<A>(std::min(in, chunks.size));
  const int64_t y_ld = leading_dimension<A>(out);
  const Bands bands(z.images, z.height, z.width, (z.width + 2) * bytes_of<A>(a_ld), kBandBytes,
                    num_threads());
  Workspace workspace{bytes_of<A>(b.packed_size()), padded_bytes<A>(in), padded_bytes<A>(in),
                      Moments::bytes(bands.parts(), out)};
  A* packed = workspace.take<A>(b.packed_size());
  const A* scale = workspace.take_padded(args.scale, in);
  const A* shift = workspace.take_padded(args.shift, in);
  Moments moments(workspace, bands.parts(), out);
  pack_weights(b, packed);
  const TapOffsets a_taps(z.width, a_ld);
  const PackedTaps<A> b_taps(in);

  parallel(bands.parts(), [&](int64_t part) {
    A* a = scratch<A>(Slot::kActivation, bands.max_padded_pixels() * a_ld);
    A* ys = scratch<A>(Slot::kProduct, bands.max_pixels() * y_ld);
    moments.clear(part);
    const Range range = bands.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Band band = bands[i];
      for (int64_t c = 0; c < chunks.count; c++) {
        const Range chunk = chunks[c];
        fill_padded(band, a, a_ld, [&](int64_t pixel, A* line) {
          activate_rows(z.at(pixel) + chunk.begin, z.stride, z.width, chunk.size(),
                        scale + chunk.begin, shift + chunk.begin, line, a_ld);
        });
        for (int64_t line = 0; line < band.lines(); line++) {
          Product<A> product{z.width,
                             out,
                             chunk.size(),
                             a + band.padded_line(line) * a_ld,
                             a_ld,
                             1,
                             packed + chunk.begin * kPanel<A>,
                             kTaps * in * kPanel<A>,
                             kPanel<A>,
                             ys + line * z.width * y_ld,
                             y_ld};
          product.accumulate = c > 0;
          product.taps = kTaps;
          product.a_taps = a_taps.offset;
          product.b_taps = b_taps.offset;
          multiply(product);
        }
      }
      store_rounded_rows(ys, y_ld, band.pixels(), out, args.y.at(band.first_pixel()),
                         args.y.stride);
      if (args.mean) moments.add_rows(part, ys, y_ld, band.pixels());
    }
  });
  if (args.mean) moments.finish(args.mean, args.var);
}

void bn_relu_conv3x3_forward(const Tensor& z, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& y,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var) {
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    const ForwardArguments<T> args{zs,
                                   channels<const A>(scale, "scale", in),
                                   channels<const A>(shift, "shift", in),
                                   weight_of<const T>(weight, "weight", out, in, 3),
                                   pixels<T>(y, "y", zs, out),
                                   channels<A>(mean, "mean", out),
                                   channels<A>(var, "var", out)};
    if (y.numel() == 0) {
      if (mean) std::fill_n(args.mean, out, A{0});
      if (var) std::fill_n(args.var, out, A{0});
      return;
    }
    forward_kernel(args);
  });
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pixels<const T> grad, y;
  const A *u, *v;
  Pixels<const T> z;
  const A *mean, *scale, *shift;
  Weight<const T> weight;
  Pixels<T> grad_bn;
  A* sums;
  Weight<T> grad_weight;  // data null: not wanted
};

// dw[tap][c][k] (+)= sum over the band's pixels p of a[p][c] * dy[p - tap][k]. dy's border is zero
// outside the image, so every pixel of `a` may take part in every tap.
template <class A>
void add_weight_gradient(const Band& band, const A* a, int64_t a_ld, int64_t columns, const A* dy,
                         int64_t dy_ld, int64_t out, A* dw, int64_t dw_tap, bool accumulate) {
  int64_t* a_lines = scratch<int64_t>(Slot::kLines, 2 * band.lines());
  int64_t* dy_lines = a_lines + band.lines();
  for (int64_t line = 0; line < band.lines(); line++) {
    a_lines[line] = line * band.width * a_ld;
    dy_lines[line] = band.padded_line(line) * dy_ld;
  }
  const TapOffsets shift(band.width, dy_ld);
  const int64_t at_once = std::max<int64_t>(1, kWeightPixels / band.width);
  for (int64_t line = 0; line < band.lines(); line += at_once) {
    for (int64_t t = 0; t < kTaps; t++) {
      Product<A> product{
          columns,   out,   band.width,      a,    1, a_ld, dy + shift.offset[kTaps - 1 - t],
          kPanel<A>, dy_ld, dw + t * dw_tap, dy_ld};
      product.accumulate = accumulate || line > 0;
      product.taps = std::min(at_once, band.lines() - line);
      product.a_taps = a_lines + line;
      product.b_taps = dy_lines + line;
      multiply(product);
    }
  }
}

// grad[k][c][tap] = sum over parts of partial[tap][c][k]
template <class T>
void write_grad_weight(Acc<T>* partial, int64_t parts, int64_t ld, const Weight<T>& grad) {
  const int64_t threads = std::min(num_threads(), grad.in);
  parallel(threads, [&](int64_t thread) {
    const Range range = part_of(grad.in, threads, thread);
    for (int64_t c = range.begin; c < range.end; c++) {
      for (int64_t t = 0; t < kTaps; t++) {
        const int64_t row = (t * grad.in + c) * ld;
        add_parts(partial, parts, kTaps * grad.in * ld, {row, row + grad.out});
        T* target = grad.data + c * grad.in_stride + grad.tap_offset(t);
        for (int64_t k = 0; k < grad.out; k++) {
          target[k * grad.out_stride] = static_cast<T>(partial[row + k]);
        }
      }
    }
  });
}

template <class T>
void backward_kernel(const BackwardArguments<T>& args) {
  using A = Acc<T>;
  const Pixels<const T>& z = args.z;
  const int64_t in = z.channels, out = args.y.channels;
  // A transposed convolution is a convolution with the taps in reverse.
  int64_t weight_taps[kTaps];
  for (int64_t t = 0; t < kTaps; t++) weight_taps[t] = args.weight.tap_offset(kTaps - 1 - t);
  const WeightsAsB<T> b{args.weight.data,      kTaps,      out, in, args.weight.out_stride,
                        args.weight.in_stride, weight_taps};
  const Chunks chunks(in, kChannels, kPanel<A>);
  const int64_t a_ld = leading_dimension<A>(chunks.size), dy_ld = leading_dimension<A>(out);
  const Bands bands(z.images, z.height, z.width, (z.width + 2) * bytes_of<A>(2 * a_ld + dy_ld),
                    2 * kBandBytes, num_threads());
  const bool want_weight = args.grad_weight.data != nullptr;
  const int64_t dw_size = want_weight ? kTaps * in * dy_ld : 0;
  Workspace workspace{bytes_of<A>(b.packed_size()),
                      bytes_of<A>(bands.parts() * dw_size),
                      ChannelSums::bytes(bands.parts(), in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(out),
                      padded_bytes<A>(out)};
  A* packed = workspace.take<A>(b.packed_size());
  A* dw = workspace.take<A>(bands.parts() * dw_size);
  ChannelSums sums(workspace, bands.parts(), in);
  const A* mean = workspace.take_padded(args.mean, in);
  const A* scale = workspace.take_padded(args.scale, in);
  const A* shift = workspace.take_padded(args.shift, in);
  const A* u = workspace.take_padded(args.u, out);
  const A* v = workspace.take_padded(args.v, out);
  pack_weights(b, packed);
  const TapOffsets a_taps(z.width, dy_ld);
  const PackedTaps<A> b_taps(out);

  parallel(bands.parts(), [&](int64_t part) {
    A* dy = scratch<A>(Slot::kGradient, bands.max_padded_pixels() * dy_ld);
    A* a = scratch<A>(Slot::kActivation, bands.max_pixels() * a_ld);
    A* da = scratch<A>(Slot::kProduct, bands.max_pixels() * a_ld);
    sums.clear(part);
    const Range range = bands.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Band band = bands[i];
      const int64_t pixel = band.first_pixel();
      fill_padded(band, dy, dy_ld, [&](int64_t p, A* line) {
        affine_rows<T>(args.grad.at(p), args.grad.stride, args.y.at(p), args.y.stride, z.width, out,
                       nullptr, u, v, line, dy_ld);
      });
      for (int64_t c = 0; c < chunks.count; c++) {
        const int64_t first = chunks[c].begin, columns = chunks[c].size();
        for (int64_t line = 0; line < band.lines(); line++) {
          Product<A> product{z.width,
                             columns,
                             out,
                             dy + band.padded_line(line) * dy_ld,
                             dy_ld,
                             1,
                             packed + first * kTaps * out,
                             kTaps * out * kPanel<A>,
                             kPanel<A>,
                             da + line * z.width * a_ld,
                             a_ld};
          product.taps = kTaps;
          product.a_taps = a_taps.offset;
          product.b_taps = b_taps.offset;
          const int64_t p = pixel + line * z.width;
          product.prefetch[0] = fetch_pixels(z, {p, p + z.width}, chunks[c]);
          product.prefetch[1] = fetch_pixels(args.grad_bn, {p, p + z.width}, chunks[c]);
          multiply(product);
        }
        mask_rows<Output::kWrite, 1>(da, a_ld, z.at(pixel) + first, z.stride, band.pixels(),
                                     columns, mean + first, scale + first, shift + first,
                                     args.grad_bn.at(pixel) + first, args.grad_bn.stride,
                                     sums.row(part) + first, sums.ld());
        if (!want_weight) continue;
        activate_rows(z.at(pixel) + first, z.stride, band.pixels(), columns, scale + first,
                      shift + first, a, a_ld);
        add_weight_gradient(band, a, a_ld, columns, dy, dy_ld, out,
                            dw + part * dw_size + first * dy_ld, in * dy_ld, i > range.begin);
      }
    }
  });
  sums.finish(args.sums);
  if (want_weight) write_grad_weight(dw, bands.parts(), dy_ld, args.grad_weight);
}

void bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                              const Tensor& z, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, const Tensor& grad_bn,
                              const Tensor& sums, const std::optional<Tensor>& grad_weight) {
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    const BackwardArguments<T> args{pixels<const T>(grad, "grad", zs, out),
                                    pixels<const T>(y, "y", zs, out),
                                    channels<const A>(u, "u", out),
                                    channels<const A>(v, "v", out),
                                    zs,
                                    channels<const A>(mean, "mean", in),
                                    channels<const A>(scale, "scale", in),
                                    channels<const A>(shift, "shift", in),
                                    weight_of<const T>(weight, "weight", out, in, 3),
                                    pixels<T>(grad_bn, "grad_bn", zs, in),
                                    channels<A>(sums, "sums", 2 * in),
                                    weight_of<T>(grad_weight, "grad_weight", out, in, 3)};
    if (zs.count() == 0) {
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    backward_kernel(args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_ext, CPU, m) {
  m.impl("bn_relu_conv3x3_forward", TORCH_BOX(&bn_relu_conv3x3_forward));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace dense_ext
