// Gradients without a convolution:
//   affine_gradient:   out = grad + u*x + v, where u*x is 0 if u is
//   scaled_accumulate: out += scale*grad
//
// grad, x, out [N, H, W, C], each with its own pixel stride (out may be grad itself); u, v,
// scale [C]. Both move 3 C elements per pixel.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "parallel.h"
#include "rows.h"
#include "tensor.h"

namespace dense_ext {
namespace {

// The minimum number of pixels that is worth a thread.
constexpr int64_t kMinRows = 64;

template <class Body>
void parallel_rows(int64_t rows, const Body& body) {
  const int64_t parts = std::min(num_threads(), ceil_div(rows, kMinRows));
  parallel(parts, [&](int64_t part) { body(part_of(rows, parts, part)); });
}

template <class T>
void affine_gradient_kernel(const Pixels<const T>& grad, const Pixels<const T>& x, const Acc<T>* u,
                            const Acc<T>* v, const Pixels<T>& out) {
  parallel_rows(x.count(), [&](Range rows) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
      for_vectors<T>(x.channels, [&](int64_t j, auto count) {
        store(out.at(r) + j,
              load(grad.at(r) + j, count) +
                  affine(load(u + j, count), load(x.at(r) + j, count), load(v + j, count)),
              count);
      });
    }
  });
}

template <class T>
void scaled_accumulate_kernel(const Pixels<const T>& grad, const Acc<T>* scale,
                              const Pixels<T>& out) {
  parallel_rows(out.count(), [&](Range rows) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
      for_vectors<T>(out.channels, [&](int64_t j, auto count) {
        T* o = out.at(r) + j;
        store(o, load(o, count) + load(scale + j, count) * load(grad.at(r) + j, count), count);
      });
    }
  });
}

}  // namespace

void affine_gradient(const Tensor& grad, const Tensor& x, const Tensor& u, const Tensor& v,
                     const Tensor& out) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    const auto grads = pixels<const T>(grad, "grad", xs, xs.channels);
    const auto outs = pixels<T>(out, "out", xs, xs.channels);
    const A* us = channels<const A>(u, "u", xs.channels);
    const A* vs = channels<const A>(v, "v", xs.channels);
    if (x.numel() > 0) affine_gradient_kernel<T>(grads, xs, us, vs, outs);
  });
}

void scaled_accumulate(const Tensor& grad, const Tensor& scale, const Tensor& out) {
  dispatch(out, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto outs = pixels<T>(out, "out");
    const auto grads = pixels<const T>(grad, "grad", outs, outs.channels);
    const auto* scales = channels<const Acc<T>>(scale, "scale", outs.channels);
    if (out.numel() > 0) scaled_accumulate_kernel<T>(grads, scales, outs);
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("affine_gradient", TORCH_BOX(&affine_gradient));
  m.impl("scaled_accumulate", TORCH_BOX(&scaled_accumulate));
}

}  // namespace dense_ext
