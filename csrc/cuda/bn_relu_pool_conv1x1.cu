// Forward:  p = avg_pool2x2(relu(scale*x + shift));  y = p @ W^T
// Backward: da = (grad @ W) / 4 for each pixel of a window
//           g = da where scale*x + shift > 0, else 0;  grad_x = scale*g
//           sums = [sum g, sum g*(x - mean)];  dW = grad^T @ p
// Backward through the norm: first the sums, then grad_x = scale*g + u*x + v.
//
// x, grad_x [N, H, W, C]; y, grad [N, H/2, W/2, K]; each with its own pixel stride. W, dW [K, C],
// any strides.
//
// Elements moved per output pixel: 4 C + K forward, 10 C + 2 K backward, each from device memory
// once. Blocks that run at the same time share inputs through the L2 cache. Forward they share x if
// K exceeds a block's. Backward they share grad, since each takes a chunk of C, and both factors of
// dW.
//
// Backward is two kernels, since a block that covers all of K has no registers for dW. The first
// writes grad_x and the sums, and stores p in scratch. This takes C elements written and C read;
// otherwise the second kernel would read 4 C and pool them again for every 128 of K. In addition,
// each block writes a row of sums, or its part of dW.
//
// Backward through the norm moves 14 C + 3 K. The first kernel runs twice, because u and v follow
// from the sums: first without grad_x, then for grad_x only. That moves less than reading grad_x
// and x once more and writing grad_x again.
//
// x is loaded into registers, not into shared memory. A thread loads 16 bytes of each pixel of a
// window, a step or a row ahead, into 16 registers. In shared memory, x of a step of 64 windows
// would take 16 KiB, to be written and read; only p, a quarter of that, has to be there.

#include <torch/csrc/stable/library.h>

#include "bn_relu_pool_conv1x1_backward.cuh"
#include "bn_relu_pool_conv1x1_forward.cuh"

namespace dense_ext {
namespace {

void bn_relu_pool_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const Tensor& weight, const Tensor& y, bool tf32) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const Pixels<T> windows{nullptr, xs.images, xs.height / 2, xs.width / 2, 0, 0};
    const int64_t in = xs.channels, out = weight.size(0);
    const auto ys = pixels<T>(y, "y", windows, out);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    if (ys.count() == 0) return;
    const Tensor dense = with_dense_rows(weight, weights);
    const ForwardArguments<T> args{
        .x = xs,
        .scale = scales,
        .shift = shifts,
        .weight = weights,
        .y = ys,
        .x_bytes = AccessBytes().add(xs),
        .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
        .y_bytes = AccessBytes().add(ys)};
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      // With FMAs the product takes far longer than pooling x again for every 128 of K.
      if constexpr (!Math::kExact) {
        if (out > 128) return run_forward<Forward<Math, 256>>(args);
      }
      run_forward<Forward<Math, 128>>(args);
    });
  });
}

void run_backward(Pass pass, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mean,
                  const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& u,
                  const std::optional<Tensor>& v, const Tensor& weight, const Tensor& grad_x,
                  const std::optional<Tensor>& sums, const std::optional<Tensor>& grad_weight,
                  bool tf32) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    Pixels<T> pooled{nullptr, xs.images, xs.height / 2, xs.width / 2, xs.channels, 0};
    const int64_t in = xs.channels, out = weight.size(0), windows = pooled.count();
    const auto gradient = pixels<const T>(grad, "grad", pooled, out);
    const auto* means = channels<const float>(mean, "mean", in);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    const auto* us = channels<const float>(u, "u", in);
    const auto* vs = channels<const float>(v, "v", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    const auto grad_xs = pixels<T>(grad_x, "grad_x", xs, in);
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 1);
    if (windows == 0) {  // no images, or images too small for a window
      zero(grad_x);
      if (sums) zero(*sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    std::optional<Tensor> p;
    if (grad_weight) {
      pooled.stride = round_up(in, kUnit<T>);
      const int64_t size[] = {windows, pooled.stride};
      p = torch::stable::new_empty(x, size);
      pooled.data = static_cast<T*>(p->data_ptr());
    }
    DataArguments<T> args{.grad = gradient,
                          .x = xs,
                          .mean = means,
                          .scale = scales,
                          .shift = shifts,
                          .u = us,
                          .v = vs,
                          .weight = weights,
                          .grad_x = grad_xs,
                          .pooled = pooled,
                          .rows = nullptr,
                          .grad_bytes = AccessBytes().add(gradient),
                          .x_bytes = AccessBytes().add(xs),
                          .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
                          .grad_x_bytes = AccessBytes().add(grad_xs)};
    if (pass == Pass::kSums) {
      args.grad_x.data = nullptr;
    } else {
      run_edges(args);
    }
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if (pass == Pass::kAffine) return run_data<Data<Math, true>>(args, x, sum);
      run_data<Data<Math, false>>(args, x, sum);
      if (!grad_weight) return;
      const WeightArguments<T> weight_args{
          .grad = gradient,
          .pooled = {pooled.data, pooled.images, pooled.height, pooled.width, in, pooled.stride},
          .rows = nullptr,
          .in_blocks = 0,
          .grad_bytes = args.grad_bytes,
          .pooled_bytes = 16};  // whole units, which hold zeros beyond C
      run_weight<WeightProduct<Math>>(weight_args, x, dw);
    });
  });
}

void bn_relu_pool_conv1x1_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                   const Tensor& scale, const Tensor& shift, const Tensor& weight,
                                   const Tensor& grad_x, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight, bool tf32) {
  const OnDeviceOf device(x);
  run_backward(Pass::kWhole, grad, x, mean, scale, shift, {}, {}, weight, grad_x, sums, grad_weight,
               tf32);
}

void bn_relu_pool_conv1x1_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                        const Tensor& var, const Tensor& norm_weight, double eps,
                                        const Tensor& scale, const Tensor& shift,
                                        const Tensor& weight, const Tensor& grad_x,
                                        const Tensor& grad_norm_weight,
                                        const Tensor& grad_norm_bias,
                                        const std::optional<Tensor>& grad_weight, bool tf32) {
  const OnDeviceOf device(x);
  const ThroughNorm norm(x, mean, var, norm_weight, eps, grad_norm_weight, grad_norm_bias);
  run_backward(Pass::kSums, grad, x, mean, scale, shift, {}, {}, weight, grad_x, norm.sums,
               grad_weight, tf32);
  norm.gradient.run();
  run_backward(Pass::kAffine, grad, x, {}, scale, shift, norm.u, norm.v, weight, grad_x, {}, {},
               tf32);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_pool_conv1x1_forward", TORCH_BOX(&bn_relu_pool_conv1x1_forward));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&bn_relu_pool_conv1x1_backward));
  m.impl("bn_relu_pool_conv1x1_norm_backward", TORCH_BOX(&bn_relu_pool_conv1x1_norm_backward));
}

}  // namespace dense_ext
