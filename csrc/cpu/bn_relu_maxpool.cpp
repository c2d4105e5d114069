// Forward:  y = max over 3x3 windows, 2 apart, of relu(scale*x + shift); padding is ignored.
// Backward: the first maximum of each window in row-major order takes the window's gradient;
//           g = the sum of the gradients that a pixel took where scale*x + shift > 0, else 0
//           grad_x = scale*g;  sums = [sum g, sum g*(x - mean)]
//
// x, grad_x [N, H, W, C]; y, grad [N, (H-1)/2 + 1, (W-1)/2 + 1, C]; each with its own pixel stride.
// Moves 5/4 C elements per input pixel forward, 9/4 C backward: backward computes the activations
// and the windows' maxima again from x, in the cache. Volumes [N, D, H, W, C] have 3x3x3 windows.

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "reduce.h"

namespace dense_ext {
namespace {

// Scratch for the gradients of a band of input rows.
constexpr int64_t kBandBytes = 256 << 10;

// The part of the window of output position `out` that is inside a dimension of this length.
Range window_of(int64_t out, int64_t length) {
  return {std::max<int64_t>(0, 2 * out - 1), std::min(length, 2 * out + 2)};
}

// Some images of x, counted over all volumes.
using Images = Range;

// The pixels of one window that are inside the image or volume, in row-major order.
struct Window {
  int64_t count = 0;
  int64_t pixel[27];

  template <class T>
  Window(const Pixels<T>& x, Images images, int64_t oh, int64_t ow) {
    const Range rows = window_of(oh, x.height), columns = window_of(ow, x.width);
    for (int64_t i = images.begin; i < images.end; i++) {
      for (int64_t h = rows.begin; h < rows.end; h++) {
        for (int64_t w = columns.begin; w < columns.end; w++) {
          pixel[count++] = (i * x.height + h) * x.width + w;
        }
      }
    }
  }
};

// x, and the shape of the pooled x. The images of an output image's windows are one image, or up to
// three planes of a volume.
template <class T>
struct Pool {
  Volumes<const T> x;
  bool volumes;

  int64_t out_planes() const { return volumes ? (x.planes - 1) / 2 + 1 : x.planes; }
  Volumes<T> shape() const {
    const int64_t images = x.planes > 0 ? x.images / x.planes * out_planes() : 0;
    return {{nullptr, images, (x.height - 1) / 2 + 1, (x.width - 1) / 2 + 1, x.channels, 0},
            out_planes()};
  }
  Images inputs(int64_t out_image) const {
    if (!volumes) return {out_image, out_image + 1};
    const int64_t first = out_image / out_planes() * x.planes;
    const Range planes = window_of(out_image % out_planes(), x.planes);
    return {first + planes.begin, first + planes.end};
  }
  // The output images whose windows have pixels of an image.
  Images outputs(int64_t image) const {
    if (!volumes) return {image, image + 1};
    const int64_t first = image / x.planes * out_planes(), plane = image % x.planes;
    return {first + plane / 2, first + std::min((plane + 1) / 2 + 1, out_planes())};
  }
};

// The maxima of a window in kWidth vectors of channels from j on, and their indices in the window.
// Several vectors at once hide the latency of the comparisons.
template <class T, int kWidth>
struct Maximum {
  Vector<T> value[kWidth], index[kWidth];

  template <class Count>
  Maximum(const Pixels<const T>& x, const Window& window, int64_t j, const Acc<T>* scale,
          const Acc<T>* shift, Count count) {
    using V = Vector<T>;
    for (int v = 0; v < kWidth; v++) {
      value[v] = V{} - std::numeric_limits<Acc<T>>::infinity();
      index[v] = V{};
    }
    V number = {};
    for (int64_t i = 0; i < window.count; i++, number += 1) {
      const T* pixel = x.at(window.pixel[i]) + j;
      DENSE_UNROLL for (int v = 0; v < kWidth; v++) {
        const int64_t c = v * kLanes<T>;
        const V a = relu(load(scale + j + c) * load(pixel + c, count) + load(shift + j + c));
        const auto wins = (a > value[v]) | (a != a);  // NaN is a maximum, as in PyTorch
        value[v] = wins ? a : value[v];
        index[v] = wins ? number : index[v];
      }
    }
  }
};

template <class T>
void forward_kernel(const Pool<T>& pool, const Acc<T>* scale_, const Acc<T>* shift_,
                    const Pixels<T>& y) {
  using A = Acc<T>;
  const Pixels<const T>& x = pool.x;
  Workspace workspace{padded_bytes<A>(x.channels), padded_bytes<A>(x.channels)};
  const A* scale = workspace.take_padded(scale_, x.channels);
  const A* shift = workspace.take_padded(shift_, x.channels);
  const int64_t lines = y.images * y.height, parts = std::min(lines, num_threads());
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(lines, parts, part);
    for (int64_t p = range.begin * y.width; p < range.end * y.width; p++) {
      const int64_t line = p / y.width;
      const Window window(x, pool.inputs(line / y.height), line % y.height, p % y.width);
      for_blocks<T>(x.channels, [&](int64_t j, auto width, auto count) {
        constexpr int kWidth = decltype(width)::value;
        const Maximum<T, kWidth> best(x, window, j, scale, shift, count);
        DENSE_UNROLL for (int v = 0; v < kWidth; v++) {
          store(y.at(p) + j + v * kLanes<T>, best.value[v], count);
        }
      });
    }
  });
}

void bn_relu_maxpool_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& y) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = volumes<const T>(x, "x");
    const Pool<T> pool{xs, x.dim() == 5};
    const auto ys = volumes<T>(y, "y", pool.shape(), xs.channels);
    const auto* scales = channels<const Acc<T>>(scale, "scale", xs.channels);
    const auto* shifts = channels<const Acc<T>>(shift, "shift", xs.channels);
    if (x.numel() > 0) forward_kernel<T>(pool, scales, shifts, ys);
  });
}

// --- backward --------------------------------------------------------------------------------

// For the windows of one output line, adds each window's gradient to da[pixel][c] of the pixel that
// is its maximum, if that is in the band. da begins with the band's first pixel.
template <class T>
void scatter_line(const Pixels<const T>& grad, const Pool<T>& pool, int64_t out_image, int64_t oh,
                  Range band, const Acc<T>* scale, const Acc<T>* shift, Acc<T>* da, int64_t ld) {
  using V = Vector<T>;
  const Pixels<const T>& x = pool.x;
  const Images images = pool.inputs(out_image);
  for (int64_t ow = 0; ow < grad.width; ow++) {
    const Window window(x, images, oh, ow);
    const T* g = grad.at((out_image * grad.height + oh) * grad.width + ow);
    for_blocks<T>(x.channels, [&](int64_t j, auto width, auto count) {
      constexpr int kWidth = decltype(width)::value;
      const Maximum<T, kWidth> best(x, window, j, scale, shift, count);
      V gradient[kWidth];
      DENSE_UNROLL for (int v = 0; v < kWidth; v++) gradient[v] =
          load(g + j + v * kLanes<T>, count);
      for (int64_t i = 0; i < window.count; i++) {
        if (window.pixel[i] < band.begin || window.pixel[i] >= band.end) continue;
        Acc<T>* target = da + (window.pixel[i] - band.begin) * ld + j;
        const V number = V{} + static_cast<Acc<T>>(i);
        DENSE_UNROLL for (int v = 0; v < kWidth; v++) {
          Acc<T>* t = target + v * kLanes<T>;
          store(t, load(t) + (best.index[v] == number ? gradient[v] : V{}));
        }
      }
    });
  }
}

template <class T>
struct BackwardArguments {
  using A = Acc<T>;
  Pool<T> pool;
  Pixels<const T> grad;
  const A *mean, *scale, *shift;
  Pixels<T> grad_x;
  A* sums;
};

template <class T>
void backward_kernel(const BackwardArguments<T>& args) {
  using A = Acc<T>;
  const Pixels<const T>&x = args.pool.x, &grad = args.grad;
  const int64_t ld = round_up(x.channels, kLanes<A>);
  // Bands of rows of one image. Windows across the edge of two bands are processed for both.
  const int64_t line_bytes = x.width * ld * int64_t{sizeof(A)};
  const int64_t max_rows = std::max<int64_t>(4, kBandBytes / line_bytes);
  const int64_t per_image =
      std::min(x.height, std::max(ceil_div(x.height, max_rows), ceil_div(num_threads(), x.images)));
  const int64_t bands = x.images * per_image, parts = std::min(bands, num_threads());
  Workspace workspace{ChannelSums::bytes(parts, x.channels), padded_bytes<A>(x.channels),
                      padded_bytes<A>(x.channels), padded_bytes<A>(x.channels)};
  ChannelSums sums(workspace, parts, x.channels);
  const A* mean = workspace.take_padded(args.mean, x.channels);
  const A* scale = workspace.take_padded(args.scale, x.channels);
  const A* shift = workspace.take_padded(args.shift, x.channels);

  parallel(parts, [&](int64_t part) {
    A* da = scratch<A>(Slot::kGradient, ceil_div(x.height, per_image) * x.width * ld);
    sums.clear(part);
    const Range range = part_of(bands, parts, part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t image = i / per_image;
      const Range rows = part_of(x.height, per_image, i % per_image);
      const int64_t first = (image * x.height + rows.begin) * x.width;
      const Range band = {first, first + rows.size() * x.width};
      std::fill_n(da, band.size() * ld, A{0});
      const Images outputs = args.pool.outputs(image);
      for (int64_t out_image = outputs.begin; out_image < outputs.end; out_image++) {
        // Row h belongs to the windows of output lines h/2 and (h + 1)/2.
        for (int64_t oh = rows.begin / 2; oh <= std::min(rows.end / 2, grad.height - 1); oh++) {
          scatter_line(grad, args.pool, out_image, oh, band, scale, shift, da, ld);
        }
      }
      mask_rows<Output::kWriteScaled, 1>(da, ld, x.at(first), x.stride, band.size(), x.channels,
                                         mean, scale, shift, args.grad_x.at(first),
                                         args.grad_x.stride, sums.row(part), sums.ld());
    }
  });
  sums.finish(args.sums);
}

void bn_relu_maxpool_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                              const Tensor& scale, const Tensor& shift, const Tensor& grad_x,
                              const Tensor& sums) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = volumes<const T>(x, "x");
    const int64_t n = xs.channels;
    const Pool<T> pool{xs, x.dim() == 5};
    const BackwardArguments<T> args{pool,
                                    volumes<const T>(grad, "grad", pool.shape(), n),
                                    channels<const A>(mean, "mean", n),
                                    channels<const A>(scale, "scale", n),
                                    channels<const A>(shift, "shift", n),
                                    volumes<T>(grad_x, "grad_x", xs, n),
                                    channels<A>(sums, "sums", 2 * n)};
    if (xs.count() == 0) {
      std::fill_n(args.sums, 2 * n, A{0});
      return;
    }
    backward_kernel(args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("bn_relu_maxpool_forward", TORCH_BOX(&bn_relu_maxpool_forward));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
}

}  // namespace dense_ext
