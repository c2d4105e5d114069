// A batch norm's arithmetic on per-channel vectors, all [C] in float32, with one thread per
// channel:
//   bn_scale_shift: scale = weight * invstd, shift = bias - mean*scale, invstd = 1/sqrt(var + eps)
//   bn_gradient:    grad_bias = sums[0], grad_weight = sums[1] * invstd, and with the batch's
//                   statistics also u += du, v -= scale*grad_bias/count + du*mean,
//                   du = -scale*invstd*grad_weight/count.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../primitives.h"
#include "batch_norm.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 128;

struct ScaleShiftArguments {
  const float *mean, *var, *weight, *bias;
  float eps;
  float *scale, *shift;
  int64_t channels;
};

__global__ void __launch_bounds__(kThreads) scale_shift_kernel(const ScaleShiftArguments args) {
  const int64_t c = int64_t{block_x()} * kThreads + thread_index();
  if (c >= args.channels) return;
  const float scale =
      load_global(args.weight + c) / std::sqrt(load_global(args.var + c) + args.eps);
  store_global(args.scale + c, scale);
  store_global(args.shift + c, load_global(args.bias + c) - load_global(args.mean + c) * scale);
}

}  // namespace

void bn_scale_shift(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias,
                    double eps, const Tensor& scale, const Tensor& shift) {
  const OnDeviceOf device(mean);
  const int64_t n = mean.numel();
  const ScaleShiftArguments args{.mean = channels<const float>(mean, "mean", n),
                                 .var = channels<const float>(var, "var", n),
                                 .weight = channels<const float>(weight, "weight", n),
                                 .bias = channels<const float>(bias, "bias", n),
                                 .eps = static_cast<float>(eps),
                                 .scale = channels<float>(scale, "scale", n),
                                 .shift = channels<float>(shift, "shift", n),
                                 .channels = n};
  if (n > 0) launch<scale_shift_kernel>({ceil_div(n, kThreads), 1, kThreads}, args);
}

namespace {

__global__ void __launch_bounds__(kThreads) gradient_kernel(const NormGradient args) {
  const int64_t c = int64_t{block_x()} * kThreads + thread_index();
  if (c >= args.channels) return;
  const float invstd = 1 / std::sqrt(load_global(args.var + c) + args.eps);
  const float grad_bias = load_global(args.sums + c);
  const float grad_weight = load_global(args.sums + args.channels + c) * invstd;
  store_global(args.grad_weight + c, grad_weight);
  store_global(args.grad_bias + c, grad_bias);
  if (!args.u) return;
  const float scale = load_global(args.weight + c) * invstd;
  const float du = -scale * invstd * grad_weight / args.count;
  const float dv = -(scale * grad_bias / args.count + du * load_global(args.mean + c));
  store_global(args.u + c, load_global(args.u + c) + du);
  store_global(args.v + c, load_global(args.v + c) + dv);
}

}  // namespace

void bn_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var, const Tensor& weight,
                 double eps, int64_t count, const Tensor& grad_weight, const Tensor& grad_bias,
                 const std::optional<Tensor>& u, const std::optional<Tensor>& v) {
  const OnDeviceOf device(mean);
  norm_gradient(sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v).run();
}

NormGradient norm_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var,
                           const Tensor& weight, double eps, int64_t count,
                           const Tensor& grad_weight, const Tensor& grad_bias,
                           const std::optional<Tensor>& u, const std::optional<Tensor>& v) {
  const int64_t n = mean.numel();
  STD_TORCH_CHECK(u.has_value() == v.has_value(), "u and v go together");
  return {.sums = channels<const float>(sums, "sums", 2 * n),
          .mean = channels<const float>(mean, "mean", n),
          .var = channels<const float>(var, "var", n),
          .weight = channels<const float>(weight, "weight", n),
          .eps = static_cast<float>(eps),
          .count = static_cast<float>(count),
          .grad_weight = channels<float>(grad_weight, "grad_weight", n),
          .grad_bias = channels<float>(grad_bias, "grad_bias", n),
          .u = channels<float>(u, "u", n),
          .v = channels<float>(v, "v", n),
          .channels = n};
}

void NormGradient::run() const {
  if (channels > 0) launch<gradient_kernel>({ceil_div(channels, kThreads), 1, kThreads}, *this);
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_scale_shift", TORCH_BOX(&bn_scale_shift));
  m.impl("bn_gradient", TORCH_BOX(&bn_gradient));
}

}  // namespace dense_ext
