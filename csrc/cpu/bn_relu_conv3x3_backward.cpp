// dy = grad + u*y + v
// g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0;  grad_bn = g
// sums = [sum g, sum g*(z - mean)];  dW[k, c, tap] = sum_p dy[p, k] * a[p + tap, c]
//
// z, grad_bn [N, H, W, B]; y, grad [N, H, W, K]; each with its own pixel stride. W, dW [K, B, 3,
// 3], any strides; a is the activation of the forward. Moves 2 B + 2 K elements per pixel. A band
// of dy is written once into scratch with a border of zeros. Both gradients read it, by Winograd's
// algorithm or by nine taps that are nine shifted views of it. Volumes are as in the forward.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../primitives.h"
#include "bands.h"
#include "conv3x3.h"
#include "winograd.h"

namespace dense_ext {
namespace {

constexpr int64_t kBandBytes = 512 << 10;  // of scratch
// The pixels that a weight gradient sums at a time by taps: its operands stay in the L1 cache.
constexpr int64_t kWeightPixels = 128;

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Volumes<const T> grad, y;                 // [N, H, W, K]
  const A *u, *v;                           // [K]
  Volumes<const T> z;                       // [N, H, W, B]
  const A *mean, *scale, *shift;            // [B]
  Conv3x3Weight<const WeightOf<T>> weight;  // [K, B, 3, 3]
  Volumes<T> grad_bn;                       // [N, H, W, B]
  A* sums;                                  // [2, B]
  Conv3x3Weight<WeightOf<T>> grad_weight;   // [K, B, 3, 3]; data null if unwanted
};

template <class T>
class Backward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  Backward(const BackwardArguments<T>& args, bool winograd)
      : args_(args),
        in_(args.z.channels),
        out_(args.y.channels),
        chunks_(in_, kConv3x3Channels, kPanel<E>),
        a_ld_(whole_vectors<A>(chunks_.size)),
        dy_ld_(whole_vectors<E>(elements<E>(out_))),
        dy_rows_ld_(whole_vectors<E>(out_)),
        a_line_(elements<E>(args.z.width) * a_ld_),
        weight_taps_(TapOffsets::in_weight(args.weight, /*reversed=*/true)),
        dy_taps_(TapOffsets::in_band(args.z.width, dy_ld_)),
        dy_rows_taps_(TapOffsets::in_band(args.z.width, dy_rows_ld_)),
        b_taps_(TapOffsets::in_panel<E>(out_)),
        weights_{.weights = args.weight.data,
                 .taps = args.weight.taps(),
                 .depth = out_,
                 .columns = in_,
                 .k_stride = args.weight.out_stride,
                 .j_stride = args.weight.in_stride,
                 .tap_offsets = weight_taps_.offset},
        winograd_(winograd),
        bands_(args.z, (2 * a_ld_ + dy_ld_) * int64_t{sizeof(E)}, kBandBytes, num_threads(),
               winograd_ ? 2 : 1),
        dw_(args.grad_weight, bands_.parts(), winograd_ ? kPoints : kTaps),
        workspace_{bytes_of<E>(weights_.packed_size()),
                   bytes_of<E>(points_size(weights_, winograd_)),
                   dw_.bytes(),
                   ChannelSums::bytes(bands_.parts(), in_),
                   3 * padded_bytes<A>(in_),
                   2 * padded_bytes<A>(out_)},
        packed_(workspace_.take<E>(weights_.packed_size())),
        points_(workspace_.take<E>(points_size(weights_, winograd_))),
        sums_(workspace_, bands_.parts(), in_),
        mean_(workspace_.take_padded(args.mean, in_)),
        scale_(workspace_.take_padded(args.scale, in_)),
        shift_(workspace_.take_padded(args.shift, in_)),
        u_(workspace_.take_padded(args.u, out_)),
        v_(workspace_.take_padded(args.v, out_)) {
    dw_.take(workspace_);
  }

  // As for Forward.
  bool run() {
    pack_weights(weights_, packed_);
    if (winograd_) transform_weights(weights_, packed_, points_);
    parallel(bands_.parts(), [&](int64_t part) { run_part(part); });
    sums_.finish(args_.sums);
    if (dw_.wanted() && !dw_.finish()) finite_ = false;
    return finite_;
  }

 private:
  // A thread's work: a band of pixels in scratch, and the part of the results that it adds to.
  struct Tile {
    int64_t part;
    E *dy, *dy_rows;  // the depth is the columns, and the rows
    E* a;
    A* da;
    Band band = {};
    // Whether the weight gradient has a value; for volumes it begins with zeros, since a part's
    // first band may lack a plane of the window.
    bool adds = false;
  };

  void run_part(int64_t part) {
    Tile tile{.part = part,
              .dy = scratch<E>(Slot::kGradient, bands_.max_padded_pixels() * dy_ld_),
              .a = scratch<E>(Slot::kActivation, bands_.max_lines() * a_line_),
              .da = scratch<A>(Slot::kProduct, bands_.max_pixels() * a_ld_)};
    tile.dy_rows = rows_operand(tile.dy, bands_.max_padded_pixels() * dy_rows_ld_);
    sums_.clear(part);
    const int64_t planes = args_.weight.planes;
    if (planes > 1 && dw_.wanted()) dw_.clear(part);
    const Range range = bands_.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      tile.band = bands_[i];
      tile.adds = planes > 1 || i > range.begin;
      for (int64_t c = 0; c < chunks_.count; c++) {
        if (dw_.wanted()) activate(tile, chunks_[c]);
        for (int64_t plane = 0; plane < planes; plane++) {
          if (c == 0 || planes > 1) fill_dy(tile, plane - planes / 2);
          if constexpr (kWinograd<E>) {
            if (winograd_) {
              add_gradients_of_tiles(tile, chunks_[c], plane);
              continue;
            }
          }
          add_data_gradient(tile, chunks_[c], plane);
          if (dw_.wanted()) add_weight_gradient(tile, chunks_[c], plane);
        }
        write_data_gradient(tile, chunks_[c]);
      }
    }
  }

  // Fills dy of the planes `offset` beyond the band's.
  void fill_dy(const Tile& tile, int64_t offset) {
    const Band& band = tile.band;
    fill_padded(band, offset, tile.dy, dy_ld_, [&](int64_t pixel, E* line) {
      affine_rows<T>(args_.grad.at(pixel), args_.grad.stride, args_.y.at(pixel), args_.y.stride,
                     band.width, out_, nullptr, u_, v_, line, dy_ld_);
    });
    if (dw_.wanted()) {  // each pixel with the next, since a tap may begin at any pixel
      pair_rows(tile.dy, dy_ld_, band.padded_pixels(), out_, 1, tile.dy_rows, dy_rows_ld_);
    }
  }

  // Both gradients by Winograd's algorithm, for a plane of the window: they share the points of dy.
  void add_gradients_of_tiles(const Tile& tile, Range chunk, int64_t plane) {
    const Band& band = tile.band;
    const int64_t offset = plane - args_.weight.planes / 2;
    const BandTiles<A> rows{band, tile.dy, dy_ld_, tile.da, a_ld_};
    rows.for_images([&](Range tiles, int64_t line) {
      if (!band.has_plane(line, offset)) return;
      const int64_t panels = args_.weight.planes * chunk.begin / kPanel<E>;
      const WinogradProduct<A> product{.width = band.width,
                                       .depth = out_,
                                       .columns = chunk.size(),
                                       .in_ld = dy_ld_,
                                       .out_ld = a_ld_,
                                       .b = points_ + (panels + plane) * kPoints * out_ * kPanel<E>,
                                       .b_depth = out_,
                                       .b_panel = args_.weight.planes * kPoints * out_ * kPanel<E>,
                                       .accumulate = plane > 0 && band.has_plane(line, offset - 1)};
      for_tile_groups(tiles, [&](Range group) {
        const A* dy = product.transform_inputs(group, rows);
        if (!product.write_outputs(group, dy, rows)) finite_ = false;
        if (dw_.wanted()) add_weight_points(tile, chunk, plane, product, group, dy);
      });
    });
  }

  // dW's points (+)= (A a A^T)^T @ (B^T dy B)
  void add_weight_points(const Tile& tile, Range chunk, int64_t plane,
                         const WinogradProduct<A>& product, Range group, const A* dy) {
    const BandTiles<A> rows{tile.band, nullptr, 0, tile.a, a_ld_};
    const A* a = product.transform_outputs(group, rows);
    for (int64_t p = 0; p < kPoints; p++) {
      multiply(Product<A>{.rows = chunk.size(),
                          .columns = out_,
                          .depth = group.size(),
                          .a = a + p * product.output_stride(),
                          .a_row = 1,
                          .a_depth = product.output_ld(),
                          .b = dy + p * product.input_stride(),
                          .b_panel = kPanel<A>,
                          .b_depth = product.input_ld(),
                          .c = dw_.row(tile.part, plane * kPoints + p, chunk.begin),
                          .c_row = dw_.ld(),
                          .accumulate = tile.adds || group.begin > 0});
    }
  }

  // da (+)= conv3x3^T(dy, W) for a plane of the window. The transposed convolution is a convolution
  // with the taps, and so the planes, in reverse order.
  void add_data_gradient(const Tile& tile, Range chunk, int64_t plane) {
    const Band& band = tile.band;
    const int64_t offset = plane - args_.weight.planes / 2;
    for (int64_t line = 0; line < band.lines(); line++) {
      if (!band.has_plane(line, offset)) continue;
      const int64_t pixel = band.first_pixel() + line * band.width;
      const Range pixels = {pixel, pixel + band.width};
      multiply(
          Product<E>{.rows = band.width,
                     .columns = chunk.size(),
                     .depth = elements<E>(out_),
                     .a = tile.dy + band.padded_line(line) * dy_ld_,
                     .a_row = dy_ld_,
                     .a_depth = 1,
                     .b = packed_ + chunk.begin / kPanel<E> * weights_.taps * weights_.tap_stride(),
                     .b_panel = weights_.taps * weights_.tap_stride(),
                     .b_depth = kPanel<E>,
                     .c = tile.da + line * band.width * a_ld_,
                     .c_row = a_ld_,
                     .accumulate = plane > 0 && band.has_plane(line, offset - 1),
                     .taps = kTaps,
                     .a_taps = dy_taps_.offset,
                     .b_taps = b_taps_.offset + plane * kTaps,
                     .prefetch = {fetch_pixels(args_.z, pixels, chunk),
                                  fetch_pixels(args_.grad_bn, pixels, chunk)}});
    }
  }

  // Computes grad_bn and sums from da.
  void write_data_gradient(const Tile& tile, Range chunk) {
    const int64_t pixel = tile.band.first_pixel(), c = chunk.begin;
    mask_rows<Output::kWrite, 1>(tile.da, a_ld_, args_.z.at(pixel) + c, args_.z.stride,
                                 tile.band.pixels(), chunk.size(), mean_ + c, scale_ + c,
                                 shift_ + c, args_.grad_bn.at(pixel) + c, args_.grad_bn.stride,
                                 sums_.row(tile.part) + c, sums_.ld());
  }

  void activate(const Tile& tile, Range chunk) {
    const Band& band = tile.band;
    for (int64_t line = 0; line < band.lines(); line++) {
      activate_rows<Depth::kRows>(args_.z.at(band.first_pixel() + line * band.width) + chunk.begin,
                                  args_.z.stride, band.width, chunk.size(), scale_ + chunk.begin,
                                  shift_ + chunk.begin, tile.a + line * a_line_, a_ld_);
    }
  }

  // dW[tap] (+)= sum over the band's pixels p of a[p] * dy[p - tap], for the taps that dy's plane
  // has. Outside the image dy is zero, so every pixel contributes to every tap; a pixel that isn't
  // finite makes all taps NaN.
  void add_weight_gradient(const Tile& tile, Range chunk, int64_t plane) {
    const Band& band = tile.band;
    const int64_t planes = args_.weight.planes;
    int64_t* a_lines = scratch<int64_t>(Slot::kLines, 2 * band.lines());
    int64_t* dy_lines = a_lines + band.lines();
    int64_t lines = 0;
    for (int64_t line = 0; line < band.lines(); line++) {
      if (!band.has_plane(line, plane - planes / 2)) continue;
      a_lines[lines] = line * a_line_;
      dy_lines[lines++] = band.padded_line(line) * dy_rows_ld_;
    }
    const int64_t at_once = std::max<int64_t>(1, kWeightPixels / band.width);
    for (int64_t line = 0; line < lines; line += at_once) {
      for (int64_t t = 0; t < kTaps; t++) {
        multiply(Product<E>{.rows = chunk.size(),
                            .columns = out_,
                            .depth = elements<E>(band.width),
                            .a = tile.a,
                            .a_row = 1,
                            .a_depth = a_ld_,
                            .b = tile.dy_rows + dy_rows_taps_.offset[kTaps - 1 - t],
                            .b_panel = kPanel<E>,
                            .b_depth = kIsPair<E> ? 2 * dy_rows_ld_ : dy_rows_ld_,
                            .c = dw_.row(tile.part, (planes - 1 - plane) * kTaps + t, chunk.begin),
                            .c_row = dw_.ld(),
                            .accumulate = tile.adds || line > 0,
                            .taps = std::min(at_once, lines - line),
                            .a_taps = a_lines + line,
                            .b_taps = dy_lines + line});
      }
    }
  }

  const BackwardArguments<T>& args_;
  const int64_t in_, out_;
  const Chunks chunks_;
  const int64_t a_ld_, dy_ld_, dy_rows_ld_;
  const int64_t a_line_;  // the distance between lines of an activated band
  const TapOffsets weight_taps_, dy_taps_, dy_rows_taps_, b_taps_;
  const WeightsAsB<WeightOf<T>> weights_;  // [tap][out][in]
  const bool winograd_;
  const Bands bands_;
  Conv3x3WeightGradient<WeightOf<T>> dw_;
  Workspace workspace_;
  E *const packed_, *const points_;
  ChannelSums sums_;
  const A *const mean_, *const scale_, *const shift_;
  const A *const u_, *const v_;
  std::atomic<bool> finite_ = true;
};

}  // namespace

void bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                              const Tensor& z, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, const Tensor& grad_bn,
                              const Tensor& sums, const std::optional<Tensor>& grad_weight) {
  dispatch(z, weight, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto zs = volumes<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    const BackwardArguments<T> args{
        .grad = volumes<const T>(grad, "grad", zs, out),
        .y = volumes<const T>(y, "y", zs, out),
        .u = channels<const A>(u, "u", out),
        .v = channels<const A>(v, "v", out),
        .z = zs,
        .mean = channels<const A>(mean, "mean", in),
        .scale = channels<const A>(scale, "scale", in),
        .shift = channels<const A>(shift, "shift", in),
        .weight = conv3x3_weight<const WeightOf<T>>(weight, "weight", out, in, z.dim()),
        .grad_bn = volumes<T>(grad_bn, "grad_bn", zs, in),
        .sums = channels<A>(sums, "sums", 2 * in),
        .grad_weight = conv3x3_weight<WeightOf<T>>(grad_weight, "grad_weight", out, in, z.dim())};
    if (zs.count() == 0) {
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    if (!Backward<T>(args, winograd_pays<Operand<T>>(zs)).run()) Backward<T>(args, false).run();
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace dense_ext
