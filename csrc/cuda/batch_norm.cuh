// The part of a backward pass that concerns a batch norm's own gradients.

#pragma once

#include "launch.cuh"

namespace dense_ext {

// A call of bn_gradient.
struct NormGradient {
  const float *sums, *mean, *var, *weight;
  float eps, count;
  float *grad_weight, *grad_bias;
  float *u, *v;  // null if the norm used running statistics
  int64_t channels;

  void run() const;
};

// Checks the arguments of bn_gradient.
NormGradient norm_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var,
                           const Tensor& weight, double eps, int64_t count,
                           const Tensor& grad_weight, const Tensor& grad_bias,
                           const std::optional<Tensor>& u, const std::optional<Tensor>& v);

// The results that a backward pass writes. kWhole writes all of them. Backward through a norm that
// used the batch's statistics takes two passes. One with kSums writes the sums. Then one with
// kAffine writes the gradient of x, which needs the u and v that follow from the sums.
enum class Pass { kWhole, kSums, kAffine };

// The vectors that the two passes share, and the computation of the norm's gradients between them.
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
    zero(torch::stable::narrow(all, 0, 2 * n, 2 * n));  // bn_gradient adds to u and v
    // The passes refuse a mean whose size does not match x.
    const int64_t count = x.numel() / std::max<int64_t>(1, n);
    gradient = norm_gradient(sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v);
  }
};

}  // namespace dense_ext
