// Forward:  y = conv3x3(relu(scale*z + shift), W), where the activation is padded with zeros, and
//           y's mean and variance.
// Backward: dy = grad + u*y + v
//           g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0;  grad_bn = g
//           sums = [sum g, sum g*(z - mean)];  dW[k, b, tap] = sum_p dy[p, k] * a[p + tap, b]
//
// z, grad_bn [N, H, W, B]; y, grad [N, H, W, K]; each with its own pixel stride. W, dW
// [K, B, 3, 3], any strides.
//
// Elements moved per pixel: B + K forward, 2 B + 2 K backward. A block takes patches of images.
// Forward copies z with its border to shared memory and activates it there once; the nine taps are
// nine shifted views of it. Backward does the same with dy, for both gradients in one kernel. There
// a block takes a chunk of B, keeps dW of all taps in registers for all its patches, and keeps W in
// shared memory. Patches read their common borders, and chunks of B read dy, from the L2 cache.
//
// Warps have roles, so that loading and computing in registers hide behind products: producers fill
// one stage while consumers multiply what is in the other.
//
// Reading fragments from shared memory, at 128 bytes per cycle, could bound the kernels. So a warp
// goes down lines of 16 pixels, and reads a line's fragment once for the three lines of taps that
// use it. For B = 128 and K = 32 in 16 bits, y takes 2304 bytes per pixel if a warp has 64 pixels x
// 32 channels, in large patches, and 3456 if it has 64 x 16. In large and small patches g takes
// 2304 and 3840, and dW 2240 and 2432.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "bn_relu_conv3x3_backward.cuh"
#include "bn_relu_conv3x3_forward.cuh"
#include "bn_relu_conv3x3_weight_gradient.cuh"

namespace dense_ext {

namespace {

void run_forward(const Tensor& z, const Tensor& scale, const Tensor& shift, const Tensor& weight,
                 const Tensor& y, const std::optional<Tensor>& mean,
                 const std::optional<Tensor>& var, bool tf32, const std::optional<NextNorm>& next) {
  const OnDeviceOf device(z);
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    ForwardArguments<T> args{.z = zs,
                             .scale = channels<const float>(scale, "scale", in),
                             .shift = channels<const float>(shift, "shift", in),
                             .weight = weight_of<const T>(weight, "weight", out, in, 3),
                             .y = pixels<T>(y, "y", zs, out)};
    args.z_bytes = AccessBytes().add(args.z);
    args.weight_bytes = tap_bytes(args.weight);
    args.y_bytes = AccessBytes().add(args.y);
    const MomentsTo to = moments_to(mean, var, out, next);
    if (zs.count() == 0) {
      if (mean) zero(*mean);
      if (var) zero(*var);
      return;
    }
    with_arithmetic<T>(tf32, [&](auto math) {
      with_width(std::min(args.z_bytes, args.y_bytes), [&](auto wide) {
        using Math = decltype(math);
        constexpr bool kWide = decltype(wide)::value;
        // For float, fragments are half as deep and tiles twice as large.
        constexpr int kStack = sizeof(T) == 2 ? 2 : 1;
        using Broad = Forward<Math, 48, kStack, 1, kWide>;
        using Small = Forward<Math, 32, 2 * kStack, 2, kWide>;
        static_assert(Small::shared_bytes(1) <= kSmallestSharedBytes);
        static_assert(Broad::shared_bytes(1) <= kSmallestSharedBytes);
        if (ceil_div(out, 48) < ceil_div(out, 32)) return run_forward<Broad>(args, z, to);
        if constexpr (sizeof(T) == 2) {
          using Large = Forward<Math, 32, 4, 1, kWide>;
          const int room = current_device().shared_bytes;
          if (Large::shared_bytes(Large::chunks(in)) <= room &&
              large_patches_pay<Large, Small>(zs, ceil_div(out, 32))) {
            return run_forward<Large>(args, z, to);
          }
        }
        run_forward<Small>(args, z, to);
      });
    });
  });
}

void run_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                  const Tensor& z, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                  const Tensor& weight, const Tensor& grad_bn, const Tensor& sums,
                  const std::optional<Tensor>& grad_weight, bool tf32, const NormGradient& norm) {
  const OnDeviceOf device(z);
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    const BackwardArguments<T> args{.grad = pixels<const T>(grad, "grad", zs, out),
                                    .y = pixels<const T>(y, "y", zs, out),
                                    .u = channels<const float>(u, "u", out),
                                    .v = channels<const float>(v, "v", out),
                                    .z = zs,
                                    .mean = channels<const float>(mean, "mean", in),
                                    .scale = channels<const float>(scale, "scale", in),
                                    .shift = channels<const float>(shift, "shift", in),
                                    .weight = weight_of<const T>(weight, "weight", out, in, 3),
                                    .grad_bn = pixels<T>(grad_bn, "grad_bn", zs, in),
                                    .wants_weight = grad_weight.has_value()};
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 3);
    if (zs.count() == 0) {
      zero(sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    // If K does not fit, pieces of it run one after another and add to grad_bn and the sums.
    const auto run_pieces = [&](auto config) {
      using Config = decltype(config);
      for (int64_t k = 0; k < out; k += Config::kOut) {
        const int64_t count = std::min<int64_t>(Config::kOut, out - k);
        BackwardArguments<T> piece = args;
        piece.grad = slice(args.grad, k, count);
        piece.y = slice(args.y, k, count);
        piece.u += k, piece.v += k;
        piece.weight.data += k * args.weight.out_stride;
        piece.weight.out = count;
        piece.row_size = 2 * in + (grad_weight ? kTaps * count * in : 0);
        piece.accumulate = k > 0;
        piece.grad_bytes = AccessBytes().add(piece.grad);
        piece.y_bytes = AccessBytes().add(piece.y);
        piece.z_bytes = AccessBytes().add(piece.z);
        piece.weight_bytes = tap_bytes(piece.weight);
        piece.grad_bn_bytes = AccessBytes().add(piece.grad_bn);
        Sums<T> to{.vector = sum, .channels = in, .accumulate = k > 0};
        if (k + count == out) to.norm = norm;
        if (grad_weight) to.set_weight(dw, k, count, kTaps);
        const int bytes =
            std::min({piece.grad_bytes, piece.y_bytes, piece.z_bytes, piece.grad_bn_bytes});
        with_width(bytes, [&](auto wide) {
          run_backward<typename Config::template OfWidth<decltype(wide)::value>>(piece, z, to);
        });
      }
    };
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if constexpr (sizeof(T) == 2) {  // float's tiles would not fit shared memory
        using Broad = Backward<Math, 64, 2, true>;
        using Large = Backward<Math, 32, 4, true>;
        using Small = Backward<Math, 32, 2, true>;
        static_assert(Small::shared_bytes(1) <= kSmallestSharedBytes);
        const int room = current_device().shared_bytes;
        if (Broad::shared_bytes(1) <= room && ceil_div(out, 64) < ceil_div(out, 32)) {
          run_pieces(Broad{});
        } else if (Large::shared_bytes(2) <= room &&
                   large_patches_pay<Large, Small>(zs, ceil_div(in, Large::kIn))) {
          run_pieces(Large{});
        } else {
          run_pieces(Small{});
        }
      } else {
        using Only = Backward<Math, 32, 1, true>;
        static_assert(Only::shared_bytes(1) <= kSmallestSharedBytes);
        run_pieces(Only{});
      }
    });
  });
}

}  // namespace

void bn_relu_conv3x3_forward(const Tensor& z, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& y,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                             bool tf32) {
  run_forward(z, scale, shift, weight, y, mean, var, tf32, {});
}

void bn_relu_conv3x3_forward_then(const NextNorm& next, const Tensor& z, const Tensor& scale,
                                  const Tensor& shift, const Tensor& weight, const Tensor& y,
                                  const Tensor& mean, const Tensor& var, bool tf32) {
  run_forward(z, scale, shift, weight, y, mean, var, tf32, next);
}

void bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                              const Tensor& z, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, const Tensor& grad_bn,
                              const Tensor& sums, const std::optional<Tensor>& grad_weight,
                              bool tf32) {
  run_backward(grad, y, u, v, z, mean, scale, shift, weight, grad_bn, sums, grad_weight, tf32, {});
}

void bn_relu_conv3x3_backward_then(const SummedNorm& norm, const Tensor& grad, const Tensor& y,
                                   const Tensor& u, const Tensor& v, const Tensor& z,
                                   const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                   const Tensor& weight, const Tensor& grad_bn, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight, bool tf32) {
  run_backward(grad, y, u, v, z, mean, scale, shift, weight, grad_bn, sums, grad_weight, tf32,
               norm_gradient(norm));
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_conv3x3_forward", TORCH_BOX(&bn_relu_conv3x3_forward));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace dense_ext
