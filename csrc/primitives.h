// The primitives of a dense block; dense_ext/backends/base.py documents what they compute. Each
// backend defines them in the source files of their names.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

// A further argument of products on a GPU: whether float32 may be rounded to tf32.
#ifdef DENSE_EXT_GPU
#define DENSE_EXT_TF32(argument) , argument
#else
#define DENSE_EXT_TF32(argument)
#endif

namespace dense_ext {

using torch::stable::Tensor;

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& var);

void bn_scale_shift(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias,
                    double eps, const Tensor& scale, const Tensor& shift);

void bn_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var, const Tensor& weight,
                 double eps, int64_t count, const Tensor& grad_weight, const Tensor& grad_bias,
                 const std::optional<Tensor>& u, const std::optional<Tensor>& v);

void affine_gradient(const Tensor& grad, const Tensor& x, const Tensor& u, const Tensor& v,
                     const Tensor& out);

void scaled_accumulate(const Tensor& grad, const Tensor& scale, const Tensor& out);

void bn_relu_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& z,
                             const std::optional<Tensor>& mean,
                             const std::optional<Tensor>& var DENSE_EXT_TF32(bool tf32));

void bn_relu_conv1x1_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale,
                              const Tensor& z_u, const Tensor& z_v, const Tensor& x,
                              const Tensor& mean, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& grad_x, const Tensor& sums,
                              const std::optional<Tensor>& grad_weight DENSE_EXT_TF32(bool tf32));

void bn_relu_conv3x3_forward(const Tensor& z, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& y,
                             const std::optional<Tensor>& mean,
                             const std::optional<Tensor>& var DENSE_EXT_TF32(bool tf32));

void bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                              const Tensor& z, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, const Tensor& grad_bn,
                              const Tensor& sums,
                              const std::optional<Tensor>& grad_weight DENSE_EXT_TF32(bool tf32));

// On a GPU, the blocks of a kernel that computes statistics count their arrivals. All blocks of at
// least 32 neighbouring channels share so many counters.
constexpr int kCountersPerBlocks = 17;
constexpr int64_t counters_for(int64_t channels) {
  return kCountersPerBlocks * ((channels + 31) / 32);
}

// The arguments of bn_scale_shift.
struct NextNorm {
  Tensor mean, var, weight, bias;
  double eps;
  Tensor scale, shift;
  std::optional<Tensor> counters = {};  // zeros before and after, of int32; for a GPU

  void bind() const { bn_scale_shift(mean, var, weight, bias, eps, scale, shift); }
};

// The arguments of bn_gradient.
struct SummedNorm {
  Tensor sums, mean, var, weight;
  double eps;
  int64_t count;
  Tensor grad_weight, grad_bias;
  std::optional<Tensor> u, v;

  void finish() const {
    bn_gradient(sums, mean, var, weight, eps, count, grad_weight, grad_bias, u, v);
  }
};

// A convolution, and the norm that uses what it writes: forward its statistics, as the norm's or
// those of the norm's last channels; backward its sums. On a GPU, the kernel that completes these
// goes on with the norm, which saves a launch.
#ifdef DENSE_EXT_GPU

void bn_relu_conv1x1_forward_then(const NextNorm& next, const Tensor& x, const Tensor& scale,
                                  const Tensor& shift, const Tensor& weight, const Tensor& z,
                                  const Tensor& mean, const Tensor& var, bool tf32);

void bn_relu_conv1x1_backward_then(const SummedNorm& norm, const Tensor& grad_bn, const Tensor& z,
                                   const Tensor& z_scale, const Tensor& z_u, const Tensor& z_v,
                                   const Tensor& x, const Tensor& mean, const Tensor& scale,
                                   const Tensor& shift, const Tensor& weight, const Tensor& grad_x,
                                   const Tensor& sums, const std::optional<Tensor>& grad_weight,
                                   bool tf32);

void bn_relu_conv3x3_forward_then(const NextNorm& next, const Tensor& z, const Tensor& scale,
                                  const Tensor& shift, const Tensor& weight, const Tensor& y,
                                  const Tensor& mean, const Tensor& var, bool tf32);

void bn_relu_conv3x3_backward_then(const SummedNorm& norm, const Tensor& grad, const Tensor& y,
                                   const Tensor& u, const Tensor& v, const Tensor& z,
                                   const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                   const Tensor& weight, const Tensor& grad_bn, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight, bool tf32);

#else

template <class... Arguments>
void bn_relu_conv1x1_forward_then(const NextNorm& next, const Arguments&... arguments) {
  bn_relu_conv1x1_forward(arguments...);
  next.bind();
}

template <class... Arguments>
void bn_relu_conv1x1_backward_then(const SummedNorm& norm, const Arguments&... arguments) {
  bn_relu_conv1x1_backward(arguments...);
  norm.finish();
}

template <class... Arguments>
void bn_relu_conv3x3_forward_then(const NextNorm& next, const Arguments&... arguments) {
  bn_relu_conv3x3_forward(arguments...);
  next.bind();
}

template <class... Arguments>
void bn_relu_conv3x3_backward_then(const SummedNorm& norm, const Arguments&... arguments) {
  bn_relu_conv3x3_backward(arguments...);
  norm.finish();
}

#endif

}  // namespace dense_ext
