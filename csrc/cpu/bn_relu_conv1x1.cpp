// Forward:  z = relu(scale*x + shift) @ W^T, and z's mean and variance.
// Backward: dz = z_scale*grad_bn + z_u*z + z_v
//           g = (dz @ W) where scale*x + shift > 0, else 0
//           grad_x += scale*g;  sums = [sum g, sum g*(x - mean)]
//           dW = dz^T @ relu(scale*x + shift)
//
// x, grad_x [M, C]; z, grad_bn [M, B]; each with its own pixel stride. W, dW [B, C], any strides.
// Moves C + B elements per pixel forward, 3 C + 2 B backward. x is read once. Its activations exist
// only in a tile of scratch that fits the L2 cache, from which the products read them.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "conv1x1.h"

namespace dense_ext {
namespace {

// The pixels of a tile, and the channels that are activated at a time.
constexpr int64_t kBackwardPixels = 112;
constexpr int64_t kBackwardChannels = 128;

template <class T>
struct ForwardArguments {
  using A = Acc<T>;
  Pixels<const T> x;                 // [M, C]
  const A *scale, *shift;            // [C]
  Weight<const WeightOf<T>> weight;  // [B, C]
  Pixels<T> z;                       // [M, B]
  A *mean, *var;                     // [B]; null if not wanted
};

template <class T>
class Forward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  explicit Forward(const ForwardArguments<T>& args)
      : args_(args),
        in_(args.x.channels),
        out_(args.z.channels),
        weights_(weights_as_b(args.weight, /*transposed=*/true)),
        tiles_(args.x.count(), ActivatedProduct<T>::kPixels, num_threads()),
        workspace_{bytes_of<E>(weights_.packed_size()), 2 * padded_bytes<A>(in_),
                   Moments::bytes(tiles_.parts, out_)},
        packed_(workspace_.take<E>(weights_.packed_size())),
        scale_(workspace_.take_padded(args.scale, in_)),
        shift_(workspace_.take_padded(args.shift, in_)),
        moments_(workspace_, tiles_.parts, out_) {}

  void run() {
    pack_weights(weights_, packed_);
    parallel(tiles_.parts, [&](int64_t part) { run_part(part); });
    if (args_.mean) moments_.finish(args_.mean, args_.var);
  }

 private:
  void run_part(int64_t part) {
    const ActivatedProduct<T> product{args_.x, scale_, shift_, packed_, out_};
    moments_.clear(part);
    const Range range = tiles_.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles_.tile(i), next = i + 1 < range.end ? tiles_.tile(i + 1) : Range{};
      A* z = product.run(tile, next, fetch_pixels(args_.z, tile, {0, out_}));
      store_rounded_rows(z, product.ld(), tile.size(), out_, args_.z.at(tile.begin),
                         args_.z.stride);
      if (args_.mean) moments_.add_rows(part, z, product.ld(), tile.size());
    }
  }

  const ForwardArguments<T>& args_;
  const int64_t in_, out_;
  const WeightsAsB<WeightOf<T>> weights_;  // [in][out]
  const Tiles tiles_;
  Workspace workspace_;
  E* const packed_;
  const A *const scale_, *const shift_;
  Moments moments_;
};

}  // namespace

void bn_relu_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& z,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var) {
  dispatch(x, weight, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    const ForwardArguments<T> args{
        .x = xs,
        .scale = channels<const A>(scale, "scale", in),
        .shift = channels<const A>(shift, "shift", in),
        .weight = weight_of<const WeightOf<T>>(weight, "weight", out, in, 1),
        .z = pixels<T>(z, "z", xs, out),
        .mean = channels<A>(mean, "mean", out),
        .var = channels<A>(var, "var", out)};
    if (xs.count() == 0) {
      if (mean) std::fill_n(args.mean, out, A{0});
      if (var) std::fill_n(args.var, out, A{0});
      return;
    }
    Forward<T>(args).run();
  });
}

namespace {

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pixels<const T> grad_bn, z;        // [M, B]
  const A *z_scale, *z_u, *z_v;      // [B]
  Pixels<const T> x;                 // [M, C]
  const A *mean, *scale, *shift;     // [C]
  Weight<const WeightOf<T>> weight;  // [B, C]
  Pixels<T> grad_x;                  // [M, C]
  A* sums;                           // [2, C]
  Weight<WeightOf<T>> grad_weight;   // [B, C]; data null if unwanted
};

template <class T>
class Backward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  explicit Backward(const BackwardArguments<T>& args)
      : args_(args),
        in_(args.x.channels),
        out_(args.z.channels),
        weights_(weights_as_b(args.weight, /*transposed=*/false)),
        chunks_(in_, kBackwardChannels, kPanel<E>),
        grid_(args.x.count(), in_, chunks_.count, num_threads()),
        tiles_(args.x.count(), kBackwardPixels, grid_.pixel_parts),
        dw_(args.grad_weight, grid_.pixel_parts),
        workspace_{bytes_of<E>(weights_.packed_size()), dw_.bytes(),
                   ChannelSums::bytes(grid_.pixel_parts, in_), 3 * padded_bytes<A>(in_),
                   3 * padded_bytes<A>(out_)},
        packed_(workspace_.take<E>(weights_.packed_size())),
        sums_(workspace_, grid_.pixel_parts, in_),
        mean_(workspace_.take_padded(args.mean, in_)),
        scale_(workspace_.take_padded(args.scale, in_)),
        shift_(workspace_.take_padded(args.shift, in_)),
        z_scale_(workspace_.take_padded(args.z_scale, out_)),
        z_u_(workspace_.take_padded(args.z_u, out_)),
        z_v_(workspace_.take_padded(args.z_v, out_)) {
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
  // A thread's work: a tile of pixels in scratch, and the part of the results that it adds to.
  struct Tile {
    int64_t part, dz_ld, dz_rows_ld, a_ld;
    E *dz = nullptr, *dz_rows = nullptr;  // the depth is the columns, and the rows
    E* a = nullptr;
    A* da = nullptr;
    Range pixels = {};
    bool first = false;     // the part's first tile, which initialises its weight gradient
    Prefetch next[2] = {};  // the first input of the next tile
  };

  void run_thread(int64_t thread) {
    Tile tile{.part = thread / grid_.channel_parts,
              .dz_ld = leading_dimension<E>(elements<E>(out_)),
              .dz_rows_ld = leading_dimension<E>(out_),
              .a_ld = leading_dimension<A>(chunks_.size)};
    tile.dz = scratch<E>(Slot::kGradient, kBackwardPixels * tile.dz_ld);
    tile.dz_rows = rows_operand(tile.dz, elements<E>(kBackwardPixels) * tile.dz_rows_ld);
    tile.a = scratch<E>(Slot::kActivation, elements<E>(kBackwardPixels) * tile.a_ld);
    tile.da = scratch<A>(Slot::kProduct, kBackwardPixels * tile.a_ld);
    const Range chunks = part_of(chunks_.count, grid_.channel_parts, thread % grid_.channel_parts);
    const Range tiles = tiles_.of_part(tile.part);
    for (int64_t i = tiles.begin; i < tiles.end; i++) {
      tile.pixels = tiles_.tile(i);
      tile.first = i == tiles.begin;
      const Range next = i + 1 < tiles.end ? tiles_.tile(i + 1) : Range{0, 0};
      tile.next[0] = fetch_pixels(args_.grad_bn, next, {0, out_});
      tile.next[1] = fetch_pixels(args_.z, next, {0, out_});
      const Pixels<const T>&grad_bn = args_.grad_bn, &z = args_.z;
      affine_rows(grad_bn.at(tile.pixels.begin), grad_bn.stride, z.at(tile.pixels.begin), z.stride,
                  tile.pixels.size(), out_, z_scale_, z_u_, z_v_, tile.dz, tile.dz_ld);
      if (dw_.wanted()) {
        pair_rows(tile.dz, tile.dz_ld, tile.pixels.size(), out_, 2, tile.dz_rows, tile.dz_rows_ld);
      }
      for (int64_t c = chunks.begin; c < chunks.end; c++) {
        add_data_gradient(tile, chunks_[c]);
        if (dw_.wanted()) add_weight_gradient(tile, chunks_[c], c + 1 == chunks.end);
      }
    }
  }

  // da = dz @ W, and from it grad_x and sums.
  void add_data_gradient(const Tile& tile, Range chunk) {
    const int64_t c = chunk.begin;
    multiply(Product<E>{.rows = tile.pixels.size(),
                        .columns = chunk.size(),
                        .depth = elements<E>(out_),
                        .a = tile.dz,
                        .a_row = tile.dz_ld,
                        .a_depth = 1,
                        .b = packed_ + c * elements<E>(out_),
                        .b_panel = elements<E>(out_) * kPanel<E>,
                        .b_depth = kPanel<E>,
                        .c = tile.da,
                        .c_row = tile.a_ld,
                        .prefetch = {fetch_pixels(args_.x, tile.pixels, chunk),
                                     fetch_pixels(args_.grad_x, tile.pixels, chunk)}});
    mask_rows<Output::kAddScaled, 1>(tile.da, tile.a_ld, args_.x.at(tile.pixels.begin) + c,
                                     args_.x.stride, tile.pixels.size(), chunk.size(), mean_ + c,
                                     scale_ + c, shift_ + c, args_.grad_x.at(tile.pixels.begin) + c,
                                     args_.grad_x.stride, sums_.row(tile.part) + c, sums_.ld());
  }

  // dW (+)= dz^T @ relu(scale*x + shift)
  void add_weight_gradient(const Tile& tile, Range chunk, bool last) {
    const int64_t c = chunk.begin;
    activate_rows<Depth::kRows>(args_.x.at(tile.pixels.begin) + c, args_.x.stride,
                                tile.pixels.size(), chunk.size(), scale_ + c, shift_ + c, tile.a,
                                tile.a_ld);
    multiply(Product<E>{
        .rows = out_,
        .columns = chunk.size(),
        .depth = elements<E>(tile.pixels.size()),
        .a = tile.dz_rows,
        .a_row = 1,
        .a_depth = tile.dz_rows_ld,
        .b = tile.a,
        .b_panel = kPanel<E>,
        .b_depth = tile.a_ld,
        .c = dw_.part(tile.part) + c,
        .c_row = dw_.ld(),
        .accumulate = !tile.first,
        .prefetch = {last ? tile.next[0] : Prefetch{}, last ? tile.next[1] : Prefetch{}}});
  }

  const BackwardArguments<T>& args_;
  const int64_t in_, out_;
  const WeightsAsB<WeightOf<T>> weights_;  // [out][in]
  const Chunks chunks_;
  const Grid grid_;
  const Tiles tiles_;
  Conv1x1WeightGradient<WeightOf<T>> dw_;
  Workspace workspace_;
  E* const packed_;
  ChannelSums sums_;
  const A *const mean_, *const scale_, *const shift_;
  const A *const z_scale_, *const z_u_, *const z_v_;
};

}  // namespace

void bn_relu_conv1x1_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale,
                              const Tensor& z_u, const Tensor& z_v, const Tensor& x,
                              const Tensor& mean, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& grad_x, const Tensor& sums,
                              const std::optional<Tensor>& grad_weight) {
  dispatch(x, weight, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    const BackwardArguments<T> args{
        .grad_bn = pixels<const T>(grad_bn, "grad_bn", xs, out),
        .z = pixels<const T>(z, "z", xs, out),
        .z_scale = channels<const A>(z_scale, "z_scale", out),
        .z_u = channels<const A>(z_u, "z_u", out),
        .z_v = channels<const A>(z_v, "z_v", out),
        .x = xs,
        .mean = channels<const A>(mean, "mean", in),
        .scale = channels<const A>(scale, "scale", in),
        .shift = channels<const A>(shift, "shift", in),
        .weight = weight_of<const WeightOf<T>>(weight, "weight", out, in, 1),
        .grad_x = pixels<T>(grad_x, "grad_x", xs, in),
        .sums = channels<A>(sums, "sums", 2 * in),
        .grad_weight = weight_of<WeightOf<T>>(grad_weight, "grad_weight", out, in, 1)};
    if (xs.count() == 0) {
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    Backward<T>(args).run();
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_relu_conv1x1_forward", TORCH_BOX(&bn_relu_conv1x1_forward));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace dense_ext
