// Every primitive's schema. What they compute is said once, in dense_ext/backends/base.py;
// kernels register themselves beside their code.

#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(dense_ext, m) {
  m.def("channel_stats(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def("bn_scale_shift(Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, Tensor(a!) scale, Tensor(b!) shift) -> ()");
  m.def("bn_gradient(Tensor sums, Tensor mean, Tensor var, Tensor weight, float eps, int count, Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor(c!)? u, Tensor(d!)? v) -> ()");
  m.def("affine_gradient(Tensor grad, Tensor x, Tensor u, Tensor v, Tensor(a!) out) -> ()");
  m.def("scaled_accumulate(Tensor grad, Tensor scale, Tensor(a!) out) -> ()");
  m.def("bn_relu_conv1x1_forward(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) z, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def("bn_relu_conv1x1_backward(Tensor(a!) grad_bn, Tensor z, Tensor z_scale, Tensor z_u, Tensor z_v, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(b!) grad_x, Tensor(c!) sums, Tensor(d!)? grad_weight) -> ()");
  m.def("bn_relu_conv3x3_forward(Tensor z, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) y, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def("bn_relu_conv3x3_backward(Tensor grad, Tensor y, Tensor u, Tensor v, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) grad_bn, Tensor(b!) sums, Tensor(c!)? grad_weight) -> ()");
  m.def("bn_relu_pool_conv1x1_forward(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) y) -> ()");
  m.def("bn_relu_pool_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) grad_x, Tensor(b!) sums, Tensor(c!)? grad_weight) -> ()");
  m.def("bn_relu_maxpool_forward(Tensor x, Tensor scale, Tensor shift, Tensor(a!) y) -> ()");
  m.def("bn_relu_maxpool_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor(a!) grad_x, Tensor(b!) sums) -> ()");
}
// clang-format on
