// Forward:  z = relu(scale*x + shift) @ W^T, and z's mean and variance.
// Backward: dz = z_scale*grad_bn + z_u*z + z_v
//           g = (dz @ W) where scale*x + shift > 0, else 0
//           grad_x += scale*g;  sums = [sum g, sum g*(x - mean)];  dW = dz^T @ relu(scale*x +
//           shift)
//
// x, grad_x [M, C], z, grad_bn [M, B], pixels their own strides apart; W, dW [B, C], any strides.
// Moves C + B elements a pixel forward, 3 C + 2 B backward: x is read once, and its activations
// live only in a tile of scratch that fits the L2 cache, where the products find them.

#include <torch/csrc/stable/library.h>

#include "conv1x1.h"

namespace dense_ext {
namespace {

// Pixels of a tile (8 register tiles), and channels activated at a time.
constexpr int64_t kForwardPixels = 112;
constexpr int64_t kForwardChannels = 256;
constexpr int64_t kBackwardPixels = 112;
constexpr int64_t kBackwardChannels = 128;

template <class T>
void forward_kernel(const Pixels<const T>& x, const Acc<T>* scale_, const Acc<T>* shift_,
                    const Weight<const T>& weight, const Pixels<T>& z, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  const int64_t in = x.channels, out = z.channels;
  const WeightsAsB<T> b{weight.data, 1, in, out, weight.in_stride, weight.out_stride, kOneTap};
  const Tiles tiles(x.count(), kForwardPixels, num_threads());
  const Chunks chunks(in, kForwardChannels, kPanel<A>);
  Workspace workspace{bytes_of<A>(b.packed_size()), padded_bytes<A>(in), padded_bytes<A>(in),
                      Moments::bytes(tiles.parts, out)};
  A* packed = workspace.take<A>(b.packed_size());
  const A* scale = workspace.take_padded(scale_, in);
  const A* shift = workspace.take_padded(shift_, in);
  Moments moments(workspace, tiles.parts, out);
  pack_weights(b, packed);

  parallel(tiles.parts, [&](int64_t part) {
    const int64_t a_ld = leading_dimension<A>(chunks.size), z_ld = leading_dimension<A>(out);
    A* a = scratch<A>(Slot::kActivation, kForwardPixels * a_ld);
    A* zs = scratch<A>(Slot::kProduct, kForwardPixels * z_ld);
    moments.clear(part);
    const Range range = tiles.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles.tile(i);
      for (int64_t c = 0; c < chunks.count; c++) {
        const Range chunk = chunks[c];
        activate_rows(x.at(tile.begin) + chunk.begin, x.stride, tile.size(), chunk.size(),
                      scale + chunk.begin, shift + chunk.begin, a, a_ld);
        Product<A> product{tile.size(),    out,       chunk.size(), a,   a_ld, 1, packed,
                           in * kPanel<A>, kPanel<A>, zs,           z_ld};
        product.b += chunk.begin * kPanel<A>;
        product.accumulate = c > 0;
        if (c + 1 < chunks.count) {
          product.prefetch[0] = fetch_pixels(x, tile, chunks[c + 1]);
        } else {
          product.prefetch[0] = fetch_pixels(z, tile, {0, out});
          if (i + 1 < range.end)
            product.prefetch[1] = fetch_pixels(x, tiles.tile(i + 1), chunks[0]);
        }
        multiply(product);
      }
      store_rounded_rows(zs, z_ld, tile.size(), out, z.at(tile.begin), z.stride);
      if (mean) moments.add_rows(part, zs, z_ld, tile.size());
    }
  });
  if (mean) moments.finish(mean, var);
}

void bn_relu_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& z,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const auto zs = pixels<T>(z, "z", xs, z.size(3));
    const A* scales = channels<const A>(scale, "scale", xs.channels);
    const A* shifts = channels<const A>(shift, "shift", xs.channels);
    const auto weights = weight_of<const T>(weight, "weight", zs.channels, xs.channels, 1);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    A* means = channels<A>(mean, "mean", zs.channels);
    A* vars = channels<A>(var, "var", zs.channels);
    if (z.numel() == 0) {
      if (means) std::fill_n(means, zs.channels, A{0});
      if (vars) std::fill_n(vars, zs.channels, A{0});
      return;
    }
    forward_kernel<T>(xs, scales, shifts, weights, zs, means, vars);
  });
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pixels<const T> grad_bn, z;
  const A *z_scale, *z_u, *z_v;
  Pixels<const T> x;
  const A *mean, *scale, *shift;
  Weight<const T> weight;
  Pixels<T> grad_x;
  A* sums;
  Weight<T> grad_weight;  // data null: not wanted
};

template <class T>
void backward_kernel(const BackwardArguments<T>& args) {
  using A = Acc<T>;
  const int64_t in = args.x.channels, out = args.z.channels;
  const WeightsAsB<T> b{args.weight.data,      1,      out, in, args.weight.out_stride,
                        args.weight.in_stride, kOneTap};
  const Chunks chunks(in, kBackwardChannels, kPanel<A>);
  const Grid grid(args.x.count(), in, chunks.count, num_threads());
  const Tiles tiles(args.x.count(), kBackwardPixels, grid.pixel_parts);
  const bool want_weight = args.grad_weight.data != nullptr;
  const int64_t dw_ld = round_up(in, kPanel<A>), dw_size = want_weight ? out * dw_ld : 0;
  Workspace workspace{bytes_of<A>(b.packed_size()),
                      bytes_of<A>(grid.pixel_parts * dw_size),
                      ChannelSums::bytes(grid.pixel_parts, in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(in),
                      padded_bytes<A>(out),
                      padded_bytes<A>(out),
                      padded_bytes<A>(out)};
  A* packed = workspace.take<A>(b.packed_size());
  A* dw = workspace.take<A>(grid.pixel_parts * dw_size);
  ChannelSums sums(workspace, grid.pixel_parts, in);
  const A* mean = workspace.take_padded(args.mean, in);
  const A* scale = workspace.take_padded(args.scale, in);
  const A* shift = workspace.take_padded(args.shift, in);
  const A* z_scale = workspace.take_padded(args.z_scale, out);
  const A* z_u = workspace.take_padded(args.z_u, out);
  const A* z_v = workspace.take_padded(args.z_v, out);
  pack_weights(b, packed);
  for (int64_t p = 0; p < grid.pixel_parts; p++) sums.clear(p);

  parallel(grid.count(), [&](int64_t thread) {
    const int64_t part = thread / grid.channel_parts;
    const Range my_chunks = part_of(chunks.count, grid.channel_parts, thread % grid.channel_parts);
    const int64_t dz_ld = leading_dimension<A>(out), a_ld = leading_dimension<A>(chunks.size);
    A* dz = scratch<A>(Slot::kGradient, kBackwardPixels * dz_ld);
    A* a = scratch<A>(Slot::kActivation, kBackwardPixels * a_ld);
    A* da = scratch<A>(Slot::kProduct, kBackwardPixels * a_ld);
    const Range range = tiles.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles.tile(i);
      const int64_t rows = tile.size();
      affine_rows(args.grad_bn.at(tile.begin), args.grad_bn.stride, args.z.at(tile.begin),
                  args.z.stride, rows, out, z_scale, z_u, z_v, dz, dz_ld);
      for (int64_t c = my_chunks.begin; c < my_chunks.end; c++) {
        const int64_t first = chunks[c].begin, columns = chunks[c].size();
        const T* x = args.x.at(tile.begin) + first;
        T* grad_x = args.grad_x.at(tile.begin) + first;
        Product<A> product{
            rows,      columns, out, dz, dz_ld, 1, packed + first * out, out * kPanel<A>,
            kPanel<A>, da,      a_ld};
        product.prefetch[0] = fetch_pixels(args.x, tile, chunks[c]);
        product.prefetch[1] = fetch_pixels(args.grad_x, tile, chunks[c]);
        multiply(product);
        mask_rows<Output::kAddScaled, 1>(da, a_ld, x, args.x.stride, rows, columns, mean + first,
                                         scale + first, shift + first, grad_x, args.grad_x.stride,
                                         sums.row(part) + first, sums.ld());
        if (!want_weight) continue;
        activate_rows(x, args.x.stride, rows, columns, scale + first, shift + first, a, a_ld);
        Product<A> weight{out,   columns, rows,      dz,   1,
                          dz_ld, a,       kPanel<A>, a_ld, dw + part * dw_size + first,
                          dw_ld};
        weight.accumulate = i > range.begin;
        if (c + 1 == my_chunks.end && i + 1 < range.end) {
          const Range next = tiles.tile(i + 1);
          weight.prefetch[0] = fetch_pixels(args.z, next, {0, out});
          weight.prefetch[1] = fetch_pixels(args.grad_bn, next, {0, out});
        }
        multiply(weight);
      }
    }
  });
  sums.finish(args.sums);
  if (want_weight) write_grad_weight(dw, grid.pixel_parts, dw_ld, args.grad_weight);
}

void bn_relu_conv1x1_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale,
                              const Tensor& z_u, const Tensor& z_v, const Tensor& x,
                              const Tensor& mean, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& grad_x, const Tensor& sums,
                              const std::optional<Tensor>& grad_weight) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = z.size(3);
    const BackwardArguments<T> args{pixels<const T>(grad_bn, "grad_bn", xs, out),
                                    pixels<const T>(z, "z", xs, out),
                                    channels<const A>(z_scale, "z_scale", out),
                                    channels<const A>(z_u, "z_u", out),
                                    channels<const A>(z_v, "z_v", out),
                                    xs,
                                    channels<const A>(mean, "mean", in),
                                    channels<const A>(scale, "scale", in),
                                    channels<const A>(shift, "shift", in),
                                    weight_of<const T>(weight, "weight", out, in, 1),
                                    pixels<T>(grad_x, "grad_x", xs, in),
                                    channels<A>(sums, "sums", 2 * in),
                                    weight_of<T>(grad_weight, "grad_weight", out, in, 1)};
    if (xs.count() == 0) {
      std::fill_n(args.sums, 2 * in, A{0});
      if (grad_weight) torch::stable::fill_(*grad_weight, 0);
      return;
    }
    backward_kernel<T>(args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_ext, CPU, m) {
  m.impl("bn_relu_conv1x1_forward", TORCH_BOX(&bn_relu_conv1x1_forward));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace dense_ext
