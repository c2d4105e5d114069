// A batch norm's arithmetic on per-channel vectors, all [C] in float32, with one thread per
// channel:
//   bn_scale_shift: scale = weight * invstd, shift = bias - mean*scale, invstd = 1/sqrt(var + eps)
//   bn_gradient:    grad_bias = sums[0], grad_weight = sums[1] * invstd, and with the batch's
//                   statistics also u += du, v -= scale*grad_bias/count + du*mean,
//                   du = -scale*invstd*grad_weight/count.

#include <torch/csrc/stable/library.h>

#include "batch_norm.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) scale_shift_kernel(const ScaleShift args) {
  const int64_t c = int64_t{block_x()} * kThreads + thread_index();
  if (c < args.channels) args.run(c, load_global(args.mean + c), load_global(args.var + c));
}

}  // namespace

void bn_scale_shift(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias,
                    double eps, const Tensor& scale, const Tensor& shift) {
  const OnDeviceOf device(mean);
  const ScaleShift args = scale_shift({mean, var, weight, bias, eps, scale, shift});
  const int64_t n = args.channels;
  if (n > 0) launch<scale_shift_kernel>({ceil_div(n, kThreads), 1, kThreads}, args);
}

ScaleShift scale_shift(const NextNorm& norm) {
  const int64_t n = norm.mean.numel();
  return {.mean = channels<const float>(norm.mean, "mean", n),
          .var = channels<const float>(norm.var, "var", n),
          .weight = channels<const float>(norm.weight, "weight", n),
          .bias = channels<const float>(norm.bias, "bias", n),
          .eps = static_cast<float>(norm.eps),
          .scale = channels<float>(norm.scale, "scale", n),
          .shift = channels<float>(norm.shift, "shift", n),
          .channels = n};
}

namespace {

__global__ void __launch_bounds__(kThreads) gradient_kernel(const NormGradient args) {
  const int64_t c = int64_t{block_x()} * kThreads + thread_index();
  if (c >= args.channels) return;
  args.run(c, load_global(args.sums + c), load_global(args.sums + args.channels + c));
}

}  // namespace

void bn_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var, const Tensor& weight,
                 double eps, int64_t count, const Tensor& grad_weight, const Tensor& grad_bias,
                 const std::optional<Tensor>& u, const std::optional<Tensor>& v) {
  const OnDeviceOf device(mean);
  norm_gradient({sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v}).run();
}

NormGradient norm_gradient(const SummedNorm& norm) {
  const int64_t n = norm.mean.numel();
  STD_TORCH_CHECK(norm.u.has_value() == norm.v.has_value(), "u and v go together");
  return {.sums = channels<const float>(norm.sums, "sums", 2 * n),
          .mean = channels<const float>(norm.mean, "mean", n),
          .var = channels<const float>(norm.var, "var", n),
          .weight = channels<const float>(norm.weight, "weight", n),
          .eps = static_cast<float>(norm.eps),
          .count = static_cast<float>(norm.count),
          .grad_weight = channels<float>(norm.grad_weight, "grad_weight", n),
          .grad_bias = channels<float>(norm.grad_bias, "grad_bias", n),
          .u = channels<float>(norm.u, "u", n),
          .v = channels<float>(norm.v, "v", n),
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
