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

// M; of a mean that is not x's, which is refused elsewhere, some number.
inline int64_t values_per_channel(const Tensor& x, const Tensor& mean) {
  return x.numel() / std::max<int64_t>(1, mean.numel());
}

// What a backward pass writes: all at once, or, through a norm of the batch's statistics, first the
// sums and then, with the u and v that follow from them, the gradient of x.
enum class Pass { kWhole, kSums, kAffine };

// What passes one after the other hand on.
struct ThroughNorm {
  Tensor sums, u, v;

  explicit ThroughNorm(const Tensor& mean)
      : ThroughNorm(scratch(4 * mean.numel(), mean), mean.numel()) {}

 private:
  ThroughNorm(Tensor all, int64_t channels)
      : sums(torch::stable::narrow(all, 0, 0, 2 * channels)),
        u(torch::stable::narrow(all, 0, 2 * channels, channels)),
        v(torch::stable::narrow(all, 0, 3 * channels, channels)) {
    zero(torch::stable::narrow(all, 0, 2 * channels, 2 * channels));  // bn_gradient adds
  }
};

}  // namespace dense_ext
