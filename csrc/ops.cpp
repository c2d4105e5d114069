// The schema of every primitive, and of whole blocks. dense_ext/backends/base.py documents what
// they compute; each kernel's source file registers its implementation. Each library registers its
// ops in its own namespace, DENSE_EXT_NAMESPACE, so that several libraries can be loaded into one
// process. DENSE_EXT_GPU is defined for the library that runs on GPUs.

#include <torch/csrc/stable/library.h>

// Products on a GPU take an argument that says whether float32 may be rounded to tf32.
#ifdef DENSE_EXT_GPU
#define TF32_ARGUMENT ", bool tf32"
#else
#define TF32_ARGUMENT ""
#endif

// In PyTorch 2.10, STABLE_TORCH_LIBRARY takes its argument's name as it is written.
#define DENSE_EXT_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

// clang-format off
DENSE_EXT_LIBRARY(DENSE_EXT_NAMESPACE, m) {
  m.def("channel_stats(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def("bn_scale_shift(Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, Tensor(a!) scale, Tensor(b!) shift) -> ()");
  m.def("bn_gradient(Tensor sums, Tensor mean, Tensor var, Tensor weight, float eps, int count, Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor(c!)? u, Tensor(d!)? v) -> ()");
  m.def("affine_gradient(Tensor grad, Tensor x, Tensor u, Tensor v, Tensor(a!) out) -> ()");
  m.def("scaled_accumulate(Tensor grad, Tensor scale, Tensor(a!) out) -> ()");
  m.def("bn_relu_conv1x1_forward(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) z, Tensor(b!)? mean, Tensor(c!)? var" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_conv1x1_backward(Tensor(a!) grad_bn, Tensor z, Tensor z_scale, Tensor z_u, Tensor z_v, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(b!) grad_x, Tensor(c!) sums, Tensor(d!)? grad_weight" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_conv3x3_forward(Tensor z, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) y, Tensor(b!)? mean, Tensor(c!)? var" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_conv3x3_backward(Tensor grad, Tensor y, Tensor u, Tensor v, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) grad_bn, Tensor(b!) sums, Tensor(c!)? grad_weight" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_pool_conv1x1_forward(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) y" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_pool_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) grad_x, Tensor(b!) sums, Tensor(c!)? grad_weight" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_maxpool_forward(Tensor x, Tensor scale, Tensor shift, Tensor(a!) y) -> ()");
  m.def("bn_relu_maxpool_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor(a!) grad_x, Tensor(b!) sums) -> ()");
  m.def("plain_block_forward(Tensor(a!) x, Tensor(b!) z, Tensor(c!) stats, int in_channels, Tensor[] weights, Tensor[] biases, float[] eps, bool[] frozen, Tensor[] running_means, Tensor[] running_vars, Tensor[] convs" TF32_ARGUMENT ") -> ()");
  m.def("plain_block_backward(Tensor(a!) grad, Tensor x, Tensor z, Tensor stats, Tensor(b!) grad_x, bool[] needs_conv_grad, int in_channels, Tensor[] weights, Tensor[] biases, float[] eps, bool[] frozen, Tensor[] running_means, Tensor[] running_vars, Tensor[] convs" TF32_ARGUMENT ") -> Tensor[]");
#ifndef DENSE_EXT_GPU
  m.def("frozen_block_forward(Tensor(a!) x, int in_channels, Tensor[] means, Tensor[] vars, Tensor[] weights, Tensor[] biases, float[] eps, Tensor[] convs) -> ()");
  m.def("pack_frozen_block(Tensor(a!) packed, int in_channels, Tensor[] means, Tensor[] vars, Tensor[] weights, Tensor[] biases, float[] eps, Tensor[] convs) -> ()");
  m.def("packed_dense_block(Tensor x, Tensor packed, int[] widths, int[] growth) -> Tensor");
  m.def("pack_frozen_transition(Tensor(a!) packed, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, Tensor conv) -> ()");
  m.def("packed_transition(Tensor x, Tensor packed, int out_channels) -> Tensor");
#else
  m.def("has_code(int device) -> bool");
  m.def("bn_relu_pool_conv1x1_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor norm_weight, float eps, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) grad_x, Tensor(b!) grad_norm_weight, Tensor(c!) grad_norm_bias, Tensor(d!)? grad_weight" TF32_ARGUMENT ") -> ()");
  m.def("bn_relu_maxpool_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor norm_weight, float eps, Tensor scale, Tensor shift, Tensor(a!) grad_x, Tensor(b!) grad_norm_weight, Tensor(c!) grad_norm_bias) -> ()");
#endif
}
// clang-format on
