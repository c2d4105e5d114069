// A batch norm's own part of a backward pass.

#pragma once

#include "launch.cuh"

namespace dense_ext {

// A call of bn_gradient.
struct NormGradient {
  const float *sums, *mean, *var, *weight;
  float eps, count;
  float *grad_weight, *grad_bias;
  float *u, *v;  // null: the batch's statistics have no gradient
  int64_t channels;

  void run() const;
};

// Its arguments, checked.
NormGradient norm_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var,
                           const Tensor& weight, double eps, int64_t count,
                           const Tensor& grad_weight, const Tensor& grad_bias,
                           const std::optional<Tensor>& u, const std::optional<Tensor>& v);

// What a backward pass writes: all at once, or, through a norm of the batch's statistics, first the
// sums and then, with the u and v that follow from them, the gradient of x.
enum class Pass { kWhole, kSums, kAffine };

// What passes one after the other hand on, and the norm's own gradients between them.
struct ThroughNorm {
  Tensor sums, u, v;
  NormGradient gradient;

  ThroughNorm(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
              double eps, const Tensor& grad_weight, const Tensor& grad_bias) {
    const int64_t n = mean.numel();
    Tensor all = scratch(4 * n, mean);
    sums = torch::stable::narrow(all, 0, 0, 2 * n);
    u = torch::stable::narrow(all, 0, 2 * n, n);
    v = torch::stable::narrow(all, 0, 3 * n, n);
    zero(torch::stable::narrow(all, 0, 2 * n, 2 * n));  // bn_gradient adds
    // A mean that is not x's is refused by the passes.
    const int64_t count = x.numel() / std::max<int64_t>(1, n);
    gradient = norm_gradient(sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v);
  }
};

}  // namespace dense_ext
