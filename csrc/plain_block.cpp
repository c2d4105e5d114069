// A dense block of plain bottleneck layers: forward and backward, in one call each. They call the
// primitives in the order of dense_ext/schedule.py, which documents the buffers, with equal bits.
// From here, a layer's calls take the host less than half the time that they take from Python.
//
// x [N, H, W, Ct] is X, and Ct = c0 + L*K. Where the primitives take volumes, D comes before H.
// stats [2, Ct + L*B] are means and variances: X's, then each layer's z's. z is the memory of every
// layer's z [N, H, W, B], or empty if none is kept. B and K may differ from layer to layer.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "primitives.h"

namespace dense_ext {
namespace {

using Tensors = std::vector<Tensor>;

// Whether the norms of several layers are bound by one call where all statistics are known. It
// saves launches on a GPU; on a CPU, a call costs less than packing its arguments.
#ifdef DENSE_EXT_GPU
constexpr bool kBindsTogether = true;
#else
constexpr bool kBindsTogether = false;
#endif
constexpr size_t kLayersTogether = 16;

// Sizes or strides of activations.
using Dimensions = std::array<int64_t, 5>;

// A view of t's memory that starts `offset` elements after t.
Tensor view(const Tensor& t, const int64_t* sizes, const int64_t* strides, int64_t dims,
            int64_t offset) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), dims, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// `count` elements of a vector that is dense from `start` on.
Tensor elements(const Tensor& t, int64_t start, int64_t count) {
  const int64_t stride = 1;
  return view(t, &count, &stride, 1, start);
}

Tensor concatenated(const Tensors& vectors) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(vectors),
                                    torch::stable::detail::from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cat", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Per-channel vectors of the statistics' dtype.
Tensor empty_vectors(const Tensor& stats, int64_t count) {
  return torch::stable::new_empty(stats, {count});
}

// A batch norm, and what it uses in this pass.
struct Norm {
  const Tensor &weight, &bias;  // [C]
  double eps;
  bool frozen;
  Tensor mean, var;  // [C]

  int64_t channels() const { return weight.numel(); }
};

struct Affine {
  Tensor scale, shift;  // [C]
};

Affine empty_affine(const Norm& norm) {
  const int64_t n = norm.channels();
  const Tensor memory = empty_vectors(norm.mean, 2 * n);
  return {elements(memory, 0, n), elements(memory, n, n)};
}

NextNorm next_norm(const Norm& norm, const Affine& affine,
                   const std::optional<Tensor>& counters = {}) {
  return {norm.mean, norm.var,     norm.weight,  norm.bias,
          norm.eps,  affine.scale, affine.shift, counters};
}

Affine bind(const Norm& norm) {
  const Affine affine = empty_affine(norm);
  next_norm(norm, affine).bind();
  return affine;
}

// The same for several norms, with one call if their eps is the same.
std::vector<Affine> bind_together(const std::vector<Norm>& norms) {
  std::vector<Affine> affine;
  const auto differs = [&](const Norm& norm) { return norm.eps != norms[0].eps; };
  if (std::any_of(norms.begin(), norms.end(), differs)) {
    for (const Norm& norm : norms) affine.push_back(bind(norm));
    return affine;
  }
  Tensors means, vars, weights, biases;
  for (const Norm& norm : norms) {
    means.push_back(norm.mean);
    vars.push_back(norm.var);
    weights.push_back(norm.weight);
    biases.push_back(norm.bias);
  }
  const Tensor mean = concatenated(means);
  const int64_t total = mean.numel();
  const Tensor memory = empty_vectors(mean, 2 * total);
  bn_scale_shift(mean, concatenated(vars), concatenated(weights), concatenated(biases),
                 norms[0].eps, elements(memory, 0, total), elements(memory, total, total));
  int64_t start = 0;
  for (const Norm& norm : norms) {
    const int64_t n = norm.channels();
    affine.push_back({elements(memory, start, n), elements(memory, total + start, n)});
    start += n;
  }
  return affine;
}

// The block's parameters, for each norm or convolution in the order they run.
struct Parameters {
  int64_t in_channels;                        // c0
  const Tensors &weights, &biases;            // of the norms [C]
  const std::vector<double>& eps;             // of the norms
  const std::vector<bool>& frozen;            // whether a norm uses its running statistics
  const Tensors &running_mean, &running_var;  // of the frozen norms [C]
  const Tensors& convs;                       // [B, C, 1, 1] and [K, B, 3, 3]
  bool tf32 = false;                          // whether a GPU may round float32 to tf32

  void check() const {
    const size_t count = convs.size();
    const auto fixed = static_cast<size_t>(std::count(frozen.begin(), frozen.end(), true));
    STD_TORCH_CHECK(count > 0 && count % 2 == 0 && weights.size() == count &&
                        biases.size() == count && eps.size() == count && frozen.size() == count,
                    "each layer takes two norms and two convolutions");
    STD_TORCH_CHECK(running_mean.size() == fixed && running_var.size() == fixed,
                    "each frozen norm takes a mean and a variance");
  }
};

// The sizes of a layer, and where its channels are among the statistics.
struct Layer {
  int64_t in, inner, out;  // C, B, K
  int64_t z_channels;      // z's first channel in the statistics
  int64_t z_elements;      // z's first element in the memory of every z
  size_t fixed;            // how many norms before it are frozen
};

class Pass {
 public:
  Pass(const Tensor& x, const Tensor& z, const Tensor& stats, const Parameters& parameters)
      : x_(x), stats_(stats), parameters_(parameters) {
    parameters.check();
    STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "x must be [N, H, W, C] or [N, D, H, W, C], has ",
                    x.dim(), " dimensions");
    for (int64_t d = 0; d < x.dim() - 1; d++) pixels_ *= x.size(d);
    int64_t in = parameters.in_channels, inner = 0;
    size_t fixed = 0;
    for (size_t i = 0; i < parameters.convs.size(); i += 2) {
      const int64_t width = parameters.convs[i].size(0), out = parameters.convs[i + 1].size(0);
      layers_.push_back({in, width, out, inner, pixels_ * inner, fixed});
      in += out, inner += width;
      widest_ = std::max(widest_, width);
      fixed += parameters.frozen[i] + parameters.frozen[i + 1];
    }
    for (Layer& layer : layers_) layer.z_channels += in;
    channels_ = in, inner_channels_ = inner;
    STD_TORCH_CHECK(x.size(x.dim() - 1) == in, "x has ", x.size(x.dim() - 1),
                    " channels, expected ", in);
    STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == in + inner &&
                        stats.is_contiguous(),
                    "stats must be [2, ", in + inner, "] and contiguous");
    keeps_z_ = z.numel() > 0;
    STD_TORCH_CHECK(!keeps_z_ || (z.numel() == pixels_ * inner && z.is_contiguous()),
                    "z must be empty or have ", pixels_ * inner, " elements, has ", z.numel());
    z_ = keeps_z_ ? z : torch::stable::new_empty(x, {pixels_ * widest_});
  }

 protected:
  // `count` channels of a tensor like x.
  Tensor channels(const Tensor& t, int64_t start, int64_t count) const {
    const int64_t last = t.dim() - 1;
    Dimensions sizes, strides;
    for (int64_t d = 0; d <= last; d++) sizes[d] = t.size(d), strides[d] = t.stride(d);
    sizes[last] = count;
    return view(t, sizes.data(), strides.data(), t.dim(), start);
  }
  // A layer's z or what has its shape, in memory that starts `start` elements after t.
  Tensor bottleneck(const Tensor& t, int64_t start, int64_t width) const {
    Dimensions sizes, strides;
    int64_t stride = 1;
    for (int64_t d = x_.dim() - 1; d >= 0; d--) {
      sizes[d] = d == x_.dim() - 1 ? width : x_.size(d);
      strides[d] = stride;
      stride *= sizes[d];
    }
    return view(t, sizes.data(), strides.data(), x_.dim(), start);
  }
  Tensor source(const Layer& layer) const { return channels(x_, 0, layer.in); }
  Tensor y(const Layer& layer) const { return channels(x_, layer.in, layer.out); }
  Tensor z(const Layer& layer) const {
    return bottleneck(z_, keeps_z_ ? layer.z_elements : 0, layer.inner);
  }
  Tensor mean(int64_t start, int64_t count) const { return elements(stats_, start, count); }
  Tensor var(int64_t start, int64_t count) const {
    return elements(stats_, stats_.size(1) + start, count);
  }

  const Tensor& conv1x1(size_t index) const { return parameters_.convs[2 * index]; }
  const Tensor& conv3x3(size_t index) const { return parameters_.convs[2 * index + 1]; }
  bool frozen(size_t index, size_t which) const { return parameters_.frozen[2 * index + which]; }
  bool all_frozen() const { return parameters_.running_mean.size() == parameters_.frozen.size(); }

  // The first or second norm of a layer.
  Norm norm(size_t index, size_t which) const {
    const Layer& layer = layers_[index];
    const size_t i = 2 * index + which;
    const Parameters& p = parameters_;
    const size_t fixed = layer.fixed + (which == 1 && p.frozen[i - 1]);
    const int64_t start = which == 0 ? 0 : layer.z_channels;
    const int64_t count = which == 0 ? layer.in : layer.inner;
    return {p.weights[i],
            p.biases[i],
            p.eps[i],
            p.frozen[i],
            p.frozen[i] ? p.running_mean[fixed] : mean(start, count),
            p.frozen[i] ? p.running_var[fixed] : var(start, count)};
  }

  // Writes a layer's z, without its statistics.
  void run_bottleneck(size_t index, const Affine& affine) const {
    const Layer& layer = layers_[index];
    bn_relu_conv1x1_forward(source(layer), affine.scale, affine.shift, conv1x1(index), z(layer), {},
                            {} DENSE_EXT_TF32(parameters_.tf32));
  }

  // The scale and shift of a layer's norms; the statistics of its group of layers must be known.
  std::array<Affine, 2> bound(size_t index) {
    if (!kBindsTogether) return {bind(norm(index, 0)), bind(norm(index, 1))};
    const size_t start = index - index % kLayersTogether;
    if (group_.empty() || start != group_start_) {
      const size_t end = std::min(start + kLayersTogether, layers_.size());
      std::vector<Norm> norms;
      for (size_t i = start; i < end; i++) {
        norms.push_back(norm(i, 0));
        norms.push_back(norm(i, 1));
      }
      group_ = bind_together(norms);
      group_start_ = start;
    }
    return {group_[2 * (index - start)], group_[2 * (index - start) + 1]};
  }

  const Tensor &x_, &stats_;
  const Parameters& parameters_;
  std::vector<Layer> layers_;
  int64_t pixels_ = 1, channels_ = 0, inner_channels_ = 0, widest_ = 0;
  bool keeps_z_ = false;
  Tensor z_;

 private:
  std::vector<Affine> group_;
  size_t group_start_ = 0;
};

class Forward : Pass {
 public:
  using Pass::Pass;

  void run() {
    // If any layer needs X's statistics, compute all of them: the next transition uses them too.
    bool wants_stats = false;
    for (size_t i = 0; i < layers_.size(); i++) wants_stats |= !frozen(i, 0);
    const int64_t in = parameters_.in_channels;
    if (wants_stats) channel_stats(channels(x_, 0, in), mean(0, in), var(0, in));
#ifdef DENSE_EXT_GPU
    if (!all_frozen()) {
      int64_t widest = widest_;
      for (const Layer& layer : layers_) widest = std::max(widest, layer.out);
      counters_ =
          torch::stable::new_zeros(x_, {counters_for(widest)}, torch::headeronly::ScalarType::Int);
    }
#endif
    for (size_t i = 0; i < layers_.size(); i++) run_layer(i, wants_stats);
  }

 private:
  // The scale and shift of a norm that no convolution before it has bound.
  Affine affine(size_t index, size_t which) {
    return kBindsTogether && all_frozen() ? bound(index)[which] : bind(norm(index, which));
  }

  // Writes a layer's y, and y's statistics if wanted.
  void run_layer(size_t index, bool wants_stats) {
    const Affine affine1 = next_ ? *next_ : affine(index, 0);
    const Affine affine2 = run_first(index, affine1);
    next_.reset();
    const Layer& layer = layers_[index];
    const Tensor z = this->z(layer), y = this->y(layer);
    std::optional<Tensor> y_mean, y_var;
    if (wants_stats) y_mean = mean(layer.in, layer.out), y_var = var(layer.in, layer.out);
    if (index + 1 == layers_.size() || frozen(index + 1, 0)) {
      bn_relu_conv3x3_forward(z, affine2.scale, affine2.shift, conv3x3(index), y, y_mean,
                              y_var DENSE_EXT_TF32(parameters_.tf32));
      return;
    }
    const Norm next = norm(index + 1, 0);
    next_ = empty_affine(next);
    bn_relu_conv3x3_forward_then(next_norm(next, *next_, counters_), z, affine2.scale,
                                 affine2.shift, conv3x3(index), y, *y_mean,
                                 *y_var DENSE_EXT_TF32(parameters_.tf32));
  }

  // Writes a layer's z, and its statistics if wanted; returns the scale and shift of z's norm.
  Affine run_first(size_t index, const Affine& affine1) {
    if (frozen(index, 1)) {
      run_bottleneck(index, affine1);
      return affine(index, 1);
    }
    const Layer& layer = layers_[index];
    const Norm next = norm(index, 1);
    const Affine affine2 = empty_affine(next);
    bn_relu_conv1x1_forward_then(next_norm(next, affine2, counters_), source(layer), affine1.scale,
                                 affine1.shift, conv1x1(index), z(layer), next.mean,
                                 next.var DENSE_EXT_TF32(parameters_.tf32));
    return affine2;
  }

  std::optional<Affine> next_;      // the next layer's first norm, if the layer before has bound it
  std::optional<Tensor> counters_;  // of the kernels that compute statistics, one after another
};

class Backward : Pass {
 public:
  Backward(const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& stats,
           const Parameters& parameters)
      : Pass(x, z, stats, parameters), g_(grad) {
    STD_TORCH_CHECK(grad.dim() == x.dim() && grad.size(grad.dim() - 1) == channels_,
                    "grad must have ", channels_, " channels, as x has");
    int64_t widest = widest_;
    for (const Layer& layer : layers_) widest = std::max(widest, layer.in);
    grad_bn_ = torch::stable::new_empty(x, {pixels_ * widest_});
    sums_ = empty_vectors(stats, 2 * widest);
    u_v_ = torch::stable::new_zeros(stats, {2, channels_ + inner_channels_});
  }

  // Returns the gradients of the norms' weights, of their biases, and of the convolutions that need
  // one, each in the order that the layers run.
  Tensors run(const std::vector<bool>& needs_conv_grad, const Tensor& grad_x) {
    const size_t count = parameters_.convs.size();
    STD_TORCH_CHECK(needs_conv_grad.size() == count, "needs_conv_grad has ", needs_conv_grad.size(),
                    " values, expected ", count);
    std::vector<std::optional<Tensor>> grad_convs(count);
    for (size_t i = 0; i < count; i++) {
      if (needs_conv_grad[i]) grad_convs[i] = torch::stable::empty_like(parameters_.convs[i]);
    }
    Tensors grad_weights(count), grad_biases(count);
    for (size_t i = layers_.size(); i-- > 0;) {
      run_layer(i, &grad_weights[2 * i], &grad_biases[2 * i], &grad_convs[2 * i]);
    }
    const int64_t in = parameters_.in_channels;
    affine_gradient(channels(g_, 0, in), channels(x_, 0, in), u(0, in), v(0, in), grad_x);

    Tensors gradients = std::move(grad_weights);
    gradients.insert(gradients.end(), grad_biases.begin(), grad_biases.end());
    for (const auto& gradient : grad_convs) {
      if (gradient) gradients.push_back(*gradient);
    }
    return gradients;
  }

 private:
  // Parts of U and V; the channels are numbered as in the statistics.
  Tensor u(int64_t start, int64_t count) const { return elements(u_v_, start, count); }
  Tensor v(int64_t start, int64_t count) const {
    return elements(u_v_, u_v_.size(1) + start, count);
  }

  // Adds a layer's part to G, U and V, and makes its gradients.
  void run_layer(size_t index, Tensor* grad_weights, Tensor* grad_biases,
                 const std::optional<Tensor>* grad_convs) {
    const Layer& layer = layers_[index];
    const Norm norm1 = norm(index, 0), norm2 = norm(index, 1);
    const auto [affine1, affine2] = bound(index);
    if (!keeps_z_) run_bottleneck(index, affine1);
    const Tensor z = this->z(layer), grad_bn = bottleneck(grad_bn_, 0, layer.inner);
    const Tensor sums2 = sums(layer.inner), z_u = u(layer.z_channels, layer.inner),
                 z_v = v(layer.z_channels, layer.inner);
    bn_relu_conv3x3_backward_then(summed(norm2, sums2, z_u, z_v, grad_weights + 1, grad_biases + 1),
                                  channels(g_, layer.in, layer.out), y(layer),
                                  u(layer.in, layer.out), v(layer.in, layer.out), z, norm2.mean,
                                  affine2.scale, affine2.shift, conv3x3(index), grad_bn, sums2,
                                  grad_convs[1] DENSE_EXT_TF32(parameters_.tf32));
    const Tensor sums1 = sums(layer.in);
    bn_relu_conv1x1_backward_then(
        summed(norm1, sums1, u(0, layer.in), v(0, layer.in), grad_weights, grad_biases), grad_bn, z,
        affine2.scale, z_u, z_v, source(layer), norm1.mean, affine1.scale, affine1.shift,
        conv1x1(index), channels(g_, 0, layer.in), sums1,
        grad_convs[0] DENSE_EXT_TF32(parameters_.tf32));
  }

  // A norm whose gradients, which are allocated here, follow from its channel sums. They add to u
  // and v unless the norm is frozen. Each gradient has memory of its own, as PyTorch asks of an
  // operator's outputs.
  SummedNorm summed(const Norm& norm, const Tensor& sums, const Tensor& u, const Tensor& v,
                    Tensor* grad_weight, Tensor* grad_bias) const {
    *grad_weight = empty_vectors(sums, norm.channels());
    *grad_bias = empty_vectors(sums, norm.channels());
    const auto unless_frozen = [&](const Tensor& t) {
      return norm.frozen ? std::nullopt : std::optional<Tensor>(t);
    };
    return {sums,    norm.mean,    norm.var,   norm.weight,      norm.eps,
            pixels_, *grad_weight, *grad_bias, unless_frozen(u), unless_frozen(v)};
  }

  // Memory for the channel sums [2, C] of one norm at a time.
  Tensor sums(int64_t count) const { return elements(sums_, 0, 2 * count); }

  const Tensor& g_;
  Tensor grad_bn_, sums_;
  Tensor u_v_;  // [2, Ct + L*B]
};

void plain_block_forward(const Tensor& x, const Tensor& z, const Tensor& stats, int64_t in_channels,
                         Tensors weights, Tensors biases, std::vector<double> eps,
                         std::vector<bool> frozen, Tensors running_mean, Tensors running_var,
                         Tensors convs DENSE_EXT_TF32(bool tf32)) {
  Forward(x, z, stats,
          {in_channels, weights, biases, eps, frozen, running_mean, running_var,
           convs DENSE_EXT_TF32(tf32)})
      .run();
}

Tensors plain_block_backward(const Tensor& grad, const Tensor& x, const Tensor& z,
                             const Tensor& stats, const Tensor& grad_x,
                             std::vector<bool> needs_conv_grad, int64_t in_channels,
                             Tensors weights, Tensors biases, std::vector<double> eps,
                             std::vector<bool> frozen, Tensors running_mean, Tensors running_var,
                             Tensors convs DENSE_EXT_TF32(bool tf32)) {
  return Backward(grad, x, z, stats,
                  {in_channels, weights, biases, eps, frozen, running_mean, running_var,
                   convs DENSE_EXT_TF32(tf32)})
      .run(needs_conv_grad, grad_x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("plain_block_forward", TORCH_BOX(&plain_block_forward));
  m.impl("plain_block_backward", TORCH_BOX(&plain_block_backward));
}

}  // namespace dense_ext
