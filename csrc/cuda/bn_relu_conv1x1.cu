// Forward:  z = relu(scale*x + shift) @ W^T, and z's mean and variance.
// Backward: dz = z_scale*grad_bn + z_u*z + z_v;  g = (dz @ W) where scale*x + shift > 0, else 0
//           grad_x += scale*g;  sums = [sum g, sum g*(x - mean)]
//           dW = dz^T @ relu(scale*x + shift)
//
// x, grad_x [M, C]; z, grad_bn [M, B]; each with its own pixel stride. W, dW [B, C].
//
// Elements moved per pixel: C + B forward, 3 C + 2 B backward, each from device memory once. Blocks
// that run at the same time share inputs through the L2 cache. Forward they share x if B exceeds
// 128; backward they share grad_bn and z, since each takes a chunk of C. Backward is one kernel: dW
// and W of the chunk stay in registers for all of a block's pixels. In addition, each block writes
// a row of moments, or of sums and dW.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "bn_relu_conv1x1_backward.cuh"
#include "bn_relu_conv1x1_forward.cuh"

namespace dense_ext {

namespace {

void run_forward(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight,
                 const Tensor& z, const std::optional<Tensor>& mean,
                 const std::optional<Tensor>& var, bool tf32, const std::optional<NextNorm>& next) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    const auto zs = pixels<T>(z, "z", xs, out);
    const MomentsTo to = moments_to(mean, var, out, next);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    if (xs.count() == 0) {
      if (mean) zero(*mean);
      if (var) zero(*var);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    const ForwardArguments<T> args{
        .x = xs,
        .scale = scales,
        .shift = shifts,
        .weight = weights,
        .z = zs,
        .moments = {},
        .x_bytes = AccessBytes().add(xs),
        .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
        .z_bytes = AccessBytes().add(zs)};
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      with_width(std::min({args.x_bytes, args.weight_bytes, args.z_bytes}), [&](auto wide) {
        constexpr bool kWide = decltype(wide)::value;
        if (out <= 64) {
          run_forward<Forward<Math, 64, kWide>>(args, x, to);
        } else {
          run_forward<Forward<Math, 128, kWide>>(args, x, to);
        }
      });
    });
  });
}

void run_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale, const Tensor& z_u,
                  const Tensor& z_v, const Tensor& x, const Tensor& mean, const Tensor& scale,
                  const Tensor& shift, const Tensor& weight, const Tensor& grad_x,
                  const Tensor& sums, const std::optional<Tensor>& grad_weight, bool tf32,
                  const NormGradient& norm) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    Weight<const T> weights = weight_of<const T>(weight, "weight", out, in, 1);
    const BackwardArguments<T> args{.grad_bn = pixels<const T>(grad_bn, "grad_bn", xs, out),
                                    .z = pixels<const T>(z, "z", xs, out),
                                    .z_scale = channels<const float>(z_scale, "z_scale", out),
                                    .z_u = channels<const float>(z_u, "z_u", out),
                                    .z_v = channels<const float>(z_v, "z_v", out),
                                    .x = xs,
                                    .mean = channels<const float>(mean, "mean", in),
                                    .scale = channels<const float>(scale, "scale", in),
                                    .shift = channels<const float>(shift, "shift", in),
                                    .grad_x = pixels<T>(grad_x, "grad_x", xs, in),
                                    .rows = nullptr,
                                    .row_size = 0,
                                    .wants_weight = grad_weight.has_value()};
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 1);
    if (xs.count() == 0) {
      zero(sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    // If B does not fit, pieces of it run one after another and add to grad_x and the sums.
    const auto run_pieces = [&](auto config) {
      using Config = decltype(config);
      for (int64_t b = 0; b < out; b += Config::kOut) {
        const int64_t count = std::min<int64_t>(Config::kOut, out - b);
        BackwardArguments<T> piece = args;
        piece.grad_bn = slice(args.grad_bn, b, count);
        piece.z = slice(args.z, b, count);
        piece.z_scale += b, piece.z_u += b, piece.z_v += b;
        piece.weight = weights;
        piece.weight.data += b * weights.out_stride;
        piece.row_size = 2 * in + (grad_weight ? count * in : 0);
        piece.grad_bn_bytes = AccessBytes().add(piece.grad_bn);
        piece.z_bytes = AccessBytes().add(piece.z);
        piece.x_bytes = AccessBytes().add(piece.x);
        piece.weight_bytes = AccessBytes().add(piece.weight.data, in, weights.out_stride);
        piece.grad_x_bytes = AccessBytes().add(piece.grad_x);
        Sums<T> to{.vector = sum, .channels = in, .accumulate = b > 0};
        if (b + count == out) to.norm = norm;
        if (grad_weight) to.set_weight(dw, b, count, 1);
        const int bytes = std::min({piece.grad_bn_bytes, piece.z_bytes, piece.x_bytes,
                                    piece.weight_bytes, piece.grad_x_bytes});
        with_width(bytes, [&](auto wide) {
          run_backward<typename Config::template OfWidth<decltype(wide)::value>>(piece, x, to);
        });
      }
    };
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if constexpr (sizeof(T) == 2) {  // for float, dW and W would not fit in registers
        if (ceil_div(out, 192) < ceil_div(out, 128)) return run_pieces(Backward<Math, 192, true>{});
      }
      run_pieces(Backward<Math, 128, true>{});
    });
  });
}

}  // namespace

void bn_relu_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& z,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                             bool tf32) {
  run_forward(x, scale, shift, weight, z, mean, var, tf32, {});
}

void bn_relu_conv1x1_forward_then(const NextNorm& next, const Tensor& x, const Tensor& scale,
                                  const Tensor& shift, const Tensor& weight, const Tensor& z,
                                  const Tensor& mean, const Tensor& var, bool tf32) {
  run_forward(x, scale, shift, weight, z, mean, var, tf32, next);
}

void bn_relu_conv1x1_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale,
                              const Tensor& z_u, const Tensor& z_v, const Tensor& x,
                              const Tensor& mean, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& grad_x, const Tensor& sums,
                              const std::optional<Tensor>& grad_weight, bool tf32) {
  run_backward(grad_bn, z, z_scale, z_u, z_v, x, mean, scale, shift, weight, grad_x, sums,
               grad_weight, tf32, {});
}

void bn_relu_conv1x1_backward_then(const SummedNorm& norm, const Tensor& grad_bn, const Tensor& z,
                                   const Tensor& z_scale, const Tensor& z_u, const Tensor& z_v,
                                   const Tensor& x, const Tensor& mean, const Tensor& scale,
                                   const Tensor& shift, const Tensor& weight, const Tensor& grad_x,
                                   const Tensor& sums, const std::optional<Tensor>& grad_weight,
                                   bool tf32) {
  run_backward(grad_bn, z, z_scale, z_u, z_v, x, mean, scale, shift, weight, grad_x, sums,
               grad_weight, tf32, norm_gradient(norm));
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_conv1x1_forward", TORCH_BOX(&bn_relu_conv1x1_forward));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace dense_ext
