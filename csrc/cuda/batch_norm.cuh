// A batch norm's arithmetic on one channel. It runs in kernels of its own, or in the kernel that
// completes the sums it needs.

#pragma once

#include <cmath>

#include "../primitives.h"
#include "launch.cuh"

namespace dense_ext {

// A call of bn_scale_shift, with null for `scale` if there is none.
struct ScaleShift {
  const float *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  float eps = 0;
  float *scale = nullptr, *shift = nullptr;
  int64_t channels = 0;

  __device__ __forceinline__ void run(int64_t c, float channel_mean, float channel_var) const {
    const float s = load_global(weight + c) / std::sqrt(channel_var + eps);
    store_global(scale + c, s);
    store_global(shift + c, load_global(bias + c) - channel_mean * s);
  }
};

// Checks the arguments of bn_scale_shift.
ScaleShift scale_shift(const NextNorm& norm);

// A call of bn_gradient, with null for `grad_weight` if there is none.
struct NormGradient {
  const float *sums = nullptr, *mean = nullptr, *var = nullptr, *weight = nullptr;
  float eps = 0, count = 0;
  float *grad_weight = nullptr, *grad_bias = nullptr;
  float *u = nullptr, *v = nullptr;  // null if the norm used running statistics
  int64_t channels = 0;

  void run() const;

  // Finishes channel c from its sums of g and of g * (x - mean).
  __device__ __forceinline__ void run(int64_t c, float sum_g, float sum_gx) const {
    const float invstd = 1 / std::sqrt(load_global(var + c) + eps);
    const float gradient = sum_gx * invstd;
    store_global(grad_weight + c, gradient);
    store_global(grad_bias + c, sum_g);
    if (!u) return;
    const float s = load_global(weight + c) * invstd;
    const float du = -s * invstd * gradient / count;
    const float dv = -(s * sum_g / count + du * load_global(mean + c));
    store_global(u + c, load_global(u + c) + du);
    store_global(v + c, load_global(v + c) + dv);
  }
};

// Checks the arguments of bn_gradient.
NormGradient norm_gradient(const SummedNorm& norm);

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
    gradient = norm_gradient({sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v});
  }
};

}  // namespace dense_ext
