// y = conv3x3(relu(scale*z + shift), W), where the activation is padded with zeros, and y's mean
// and variance.
//
// z [N, H, W, B]; y [N, H, W, K]; each with its own pixel stride. W [K, B, 3, 3], any strides.
// Moves B + K elements per pixel. A band of rows is activated once into scratch with a border of
// zeros. It is convolved by Winograd's algorithm, or by nine taps that are nine shifted views of
// it. For volumes [N, D, H, W, C] and W [K, B, 3, 3, 3], the planes of the window run one after
// another, and a band is activated from the neighbouring planes too: 27 taps are much more work.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../primitives.h"
#include "bands.h"
#include "conv3x3.h"
#include "winograd.h"

namespace dense_ext {
namespace {

constexpr int64_t kBandBytes = 256 << 10;  // of scratch

template <class T>
struct ForwardArguments {
  using A = Acc<T>;
  Volumes<const T> z;                       // [N, H, W, B]
  const A *scale, *shift;                   // [B]
  Conv3x3Weight<const WeightOf<T>> weight;  // [K, B, 3, 3]
  Volumes<T> y;                             // [N, H, W, K]
  A *mean, *var;                            // [K]; null if not wanted
};

template <class T>
class Forward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  Forward(const ForwardArguments<T>& args, bool winograd)
      : args_(args),
        in_(args.z.channels),
        out_(args.y.channels),
        chunks_(in_, kConv3x3Channels, kPanel<E>),
        a_ld_(whole_vectors<E>(elements<E>(std::min(in_, chunks_.size)))),
        y_ld_(whole_vectors<A>(out_)),
        weight_taps_(TapOffsets::in_weight(args.weight, /*reversed=*/false)),
        a_taps_(TapOffsets::in_band(args.z.width, a_ld_)),
        b_taps_(TapOffsets::in_panel<E>(in_)),
        weights_(weights_as_b(args.weight, weight_taps_)),
        winograd_(winograd),
        bands_(args.z, a_ld_ * int64_t{sizeof(E)}, kBandBytes, num_threads(), winograd_ ? 2 : 1),
        workspace_{bytes_of<E>(weights_.packed_size()),
                   bytes_of<E>(points_size(weights_, winograd_)), 2 * padded_bytes<A>(in_),
                   Moments::bytes(bands_.parts(), out_)},
        packed_(workspace_.take<E>(weights_.packed_size())),
        points_(workspace_.take<E>(points_size(weights_, winograd_))),
        scale_(workspace_.take_padded(args.scale, in_)),
        shift_(workspace_.take_padded(args.shift, in_)),
        moments_(workspace_, bands_.parts(), out_) {}

  // Returns whether the results stand: Winograd's algorithm has to find them finite.
  bool run() {
    pack_weights(weights_, packed_);
    if (winograd_) transform_weights(weights_, packed_, points_);
    parallel(bands_.parts(), [&](int64_t part) { run_part(part); });
    if (args_.mean) moments_.finish(args_.mean, args_.var);
    return finite_;
  }

 private:
  void run_part(int64_t part) {
    E* a = scratch<E>(Slot::kActivation, bands_.max_padded_pixels() * a_ld_);
    A* y = scratch<A>(Slot::kProduct, bands_.max_pixels() * y_ld_);
    moments_.clear(part);
    const Range range = bands_.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Band band = bands_[i];
      for (int64_t c = 0; c < chunks_.count; c++) {
        for (int64_t plane = 0; plane < args_.weight.planes; plane++) {
          activate(band, chunks_[c], plane, a);
          if constexpr (kWinograd<E>) {
            if (winograd_) {
              convolve_tiles(band, chunks_[c], plane, a, y);
              continue;
            }
          }
          convolve_lines(band, chunks_[c], plane, a, y);
        }
      }
      store_rounded_rows(y, y_ld_, band.pixels(), out_, args_.y.at(band.first_pixel()),
                         args_.y.stride);
      if (args_.mean) moments_.add_rows(part, y, y_ld_, band.pixels());
    }
  }

  void activate(const Band& band, Range chunk, int64_t plane, E* a) const {
    const int64_t first = chunk.begin;
    fill_padded(band, plane - args_.weight.planes / 2, a, a_ld_, [&](int64_t pixel, E* line) {
      activate_rows<Depth::kColumns>(args_.z.at(pixel) + first, args_.z.stride, band.width,
                                     chunk.size(), scale_ + first, shift_ + first, line, a_ld_);
    });
  }

  // Adds the contribution of a chunk of the channels and a plane of the window to a band of y.
  void convolve_tiles(const Band& band, Range chunk, int64_t plane, const E* a, A* y) {
    const int64_t offset = plane - args_.weight.planes / 2;
    const BandTiles<A> rows{band, a, a_ld_, y, y_ld_};
    rows.for_images([&](Range tiles, int64_t line) {
      if (!band.has_plane(line, offset)) return;
      const bool has_previous = plane > 0 && band.has_plane(line, offset - 1);
      const WinogradProduct<A> product{
          .width = band.width,
          .depth = chunk.size(),
          .columns = out_,
          .in_ld = a_ld_,
          .out_ld = y_ld_,
          .b = points_ + (plane * kPoints * in_ + chunk.begin) * kPanel<E>,
          .b_depth = in_,
          .b_panel = args_.weight.planes * kPoints * in_ * kPanel<E>,
          .accumulate = chunk.begin > 0 || has_previous};
      for_tile_groups(tiles, [&](Range group) {
        const A* z = product.transform_inputs(group, rows);
        if (!product.write_outputs(group, z, rows)) finite_ = false;
      });
    });
  }

  void convolve_lines(const Band& band, Range chunk, int64_t plane, const E* a, A* y) const {
    const int64_t offset = plane - args_.weight.planes / 2;
    for (int64_t line = 0; line < band.lines(); line++) {
      if (!band.has_plane(line, offset)) continue;
      const bool has_previous = plane > 0 && band.has_plane(line, offset - 1);
      convolve_line(a + band.padded_line(line) * a_ld_, chunk, plane,
                    chunk.begin > 0 || has_previous, y + line * band.width * y_ld_);
    }
  }

  void convolve_line(const E* a, Range chunk, int64_t plane, bool accumulate, A* y) const {
    multiply(Product<E>{.rows = args_.z.width,
                        .columns = out_,
                        .depth = elements<E>(chunk.size()),
                        .a = a,
                        .a_row = a_ld_,
                        .a_depth = 1,
                        .b = packed_ + elements<E>(chunk.begin) * kPanel<E>,
                        .b_panel = weights_.taps * weights_.tap_stride(),
                        .b_depth = kPanel<E>,
                        .c = y,
                        .c_row = y_ld_,
                        .accumulate = accumulate,
                        .taps = kTaps,
                        .a_taps = a_taps_.offset,
                        .b_taps = b_taps_.offset + plane * kTaps});
  }

  const ForwardArguments<T>& args_;
  const int64_t in_, out_;
  const Chunks chunks_;
  const int64_t a_ld_, y_ld_;
  const TapOffsets weight_taps_, a_taps_, b_taps_;
  const WeightsAsB<WeightOf<T>> weights_;  // [tap][in][out]
  const bool winograd_;
  const Bands bands_;
  Workspace workspace_;
  E *const packed_, *const points_;
  const A *const scale_, *const shift_;
  Moments moments_;
  std::atomic<bool> finite_ = true;
};

}  // namespace

void bn_relu_conv3x3_forward(const Tensor& z, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& y,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var) {
  dispatch(z, weight, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto zs = volumes<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    const ForwardArguments<T> args{
        .z = zs,
        .scale = channels<const A>(scale, "scale", in),
        .shift = channels<const A>(shift, "shift", in),
        .weight = conv3x3_weight<const WeightOf<T>>(weight, "weight", out, in, z.dim()),
        .y = volumes<T>(y, "y", zs, out),
        .mean = channels<A>(mean, "mean", out),
        .var = channels<A>(var, "var", out)};
    if (zs.count() == 0) {
      if (mean) std::fill_n(args.mean, out, A{0});
      if (var) std::fill_n(args.var, out, A{0});
      return;
    }
    if (!Forward<T>(args, winograd_pays<Operand<T>>(zs)).run()) Forward<T>(args, false).run();
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_relu_conv3x3_forward", TORCH_BOX(&bn_relu_conv3x3_forward));
}

}  // namespace dense_ext
