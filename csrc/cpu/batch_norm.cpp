// A batch norm's arithmetic on per-channel vectors, all [C] in the accumulation type:
//   bn_scale_shift: scale = weight * invstd, shift = bias - mean*scale, invstd = 1/sqrt(var + eps)
//   bn_gradient:    grad_bias = sums[0], grad_weight = sums[1] * invstd, and with the batch's
//                   statistics also u += du, v -= scale*grad_bias/count + du*mean,
//                   du = -scale*invstd*grad_weight/count.

#include "batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../primitives.h"
#include "tensor.h"

namespace dense_ext {
namespace {

// Calls body(Tag<A>{}) for the accumulation type of per-channel vectors.
template <class Body>
void dispatch_accumulate(const Tensor& t, const Body& body) {
  if (t.scalar_type() == ScalarType::Double) return body(Tag<double>{});
  body(Tag<float>{});
}

}  // namespace

void bn_scale_shift(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias,
                    double eps, const Tensor& scale, const Tensor& shift) {
  dispatch_accumulate(mean, [&](auto tag) {
    using A = typename decltype(tag)::type;
    const int64_t n = mean.numel();
    const A* means = channels<const A>(mean, "mean", n);
    const A* vars = channels<const A>(var, "var", n);
    const A* weights = channels<const A>(weight, "weight", n);
    const A* biases = channels<const A>(bias, "bias", n);
    scale_and_shift(means, vars, weights, biases, eps, n, channels<A>(scale, "scale", n),
                    channels<A>(shift, "shift", n));
  });
}

void bn_gradient(const Tensor& sums, const Tensor& mean, const Tensor& var, const Tensor& weight,
                 double eps, int64_t count, const Tensor& grad_weight, const Tensor& grad_bias,
                 const std::optional<Tensor>& u, const std::optional<Tensor>& v) {
  dispatch_accumulate(mean, [&](auto tag) {
    using A = typename decltype(tag)::type;
    const int64_t n = mean.numel();
    const A* sum = channels<const A>(sums, "sums", 2 * n);
    const A* means = channels<const A>(mean, "mean", n);
    const A* vars = channels<const A>(var, "var", n);
    const A* weights = channels<const A>(weight, "weight", n);
    A* grad_weights = channels<A>(grad_weight, "grad_weight", n);
    A* grad_biases = channels<A>(grad_bias, "grad_bias", n);
    A* us = channels<A>(u, "u", n);
    A* vs = channels<A>(v, "v", n);
    for (int64_t c = 0; c < n; c++) {
      const A invstd = 1 / std::sqrt(vars[c] + static_cast<A>(eps));
      const A sum_g = sum[c];
      const A grad = sum[n + c] * invstd;
      grad_weights[c] = grad;
      grad_biases[c] = sum_g;
      if (us && vs) {
        const A scale = weights[c] * invstd;
        const A du = -scale * invstd * grad / count;
        us[c] += du;
        vs[c] -= scale * sum_g / count + du * means[c];
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_scale_shift", TORCH_BOX(&bn_scale_shift));
  m.impl("bn_gradient", TORCH_BOX(&bn_gradient));
}

}  // namespace dense_ext
