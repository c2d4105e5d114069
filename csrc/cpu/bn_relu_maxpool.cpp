// Forward:  y = max over 3x3 windows, 2 apart, of relu(scale*x + shift); padding is ignored.
// Backward: the first maximum of each window in row-major order takes the window's gradient;
//           g = the sum of the gradients that a pixel took where scale*x + shift > 0, else 0
//           grad_x = scale*g;  sums = [sum g, sum g*(x - mean)]
//
// x, grad_x [N, H, W, C]; y, grad [N, (H-1)/2 + 1, (W-1)/2 + 1, C]; each with its own pixel stride.
// Moves 5/4 C elements per input pixel forward, 9/4 C backward: backward computes the activations
// and the windows' maxima again from x, in the cache.

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "reduce.h"

namespace dense_ext {
namespace {

// Scratch for the gradients of a band of input rows.
constexpr int64_t kBandBytes = 256 << 10;

// The input pixels of one 3x3 window that are inside the image, in row-major order.
struct Window {
  int64_t count = 0;
  int64_t row[9], pixel[9];  // the row in the image, and the pixel of the tensor

  template <class T>
  Window(const Pixels<T>& x, int64_t image, int64_t oh, int64_t ow) {
    for (int64_t h = std::max<int64_t>(0, 2 * oh - 1); h < std::min(x.height, 2 * oh + 2); h++) {
      for (int64_t w = std::max<int64_t>(0, 2 * ow - 1); w < std::min(x.width, 2 * ow + 2); w++) {
        row[count] = h;
        pixel[count++] = (image * x.height + h) * x.width + w;
      }
    }
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
void forward_kernel(const Pixels<const T>& x, const Acc<T>* scale_, const Acc<T>* shift_,
                    const Pixels<T>& y) {
  using A = Acc<T>;
  Workspace workspace{padded_bytes<A>(x.channels), padded_bytes<A>(x.channels)};
  const A* scale = workspace.take_padded(scale_, x.channels);
  const A* shift = workspace.take_padded(shift_, x.channels);
  const int64_t lines = y.images * y.height, parts = std::min(lines, num_threads());
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(lines, parts, part);
    for (int64_t p = range.begin * y.width; p < range.end * y.width; p++) {
      const int64_t line = p / y.width;
      const Window window(x, line / y.height, line % y.height, p % y.width);
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

// [N, (H-1)/2 + 1, (W-1)/2 + 1, C] of x [N, H, W, C]
template <class T>
Pixels<T> pooled_shape(const Pixels<const T>& x) {
  return {nullptr, x.images, (x.height - 1) / 2 + 1, (x.width - 1) / 2 + 1, x.channels, 0};
}

void bn_relu_maxpool_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& y) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const auto ys = pixels<T>(y, "y", pooled_shape(xs), xs.channels);
    const auto* scales = channels<const Acc<T>>(scale, "scale", xs.channels);
    const auto* shifts = channels<const Acc<T>>(shift, "shift", xs.channels);
    if (x.numel() > 0) forward_kernel<T>(xs, scales, shifts, ys);
  });
}

// --- backward --------------------------------------------------------------------------------

// For the windows of one output line, adds each window's gradient to da[pixel][c] of the pixel that
// is its maximum. The band holds the rows `band` of the image; da begins with its first pixel.
template <class T>
void scatter_line(const Pixels<const T>& grad, const Pixels<const T>& x, int64_t image, int64_t oh,
                  Range band, const Acc<T>* scale, const Acc<T>* shift, Acc<T>* da, int64_t ld) {
  using V = Vector<T>;
  const int64_t first_pixel = (image * x.height + band.begin) * x.width;
  for (int64_t ow = 0; ow < grad.width; ow++) {
    const Window window(x, image, oh, ow);
    const T* g = grad.at((image * grad.height + oh) * grad.width + ow);
    for_blocks<T>(x.channels, [&](int64_t j, auto width, auto count) {
      constexpr int kWidth = decltype(width)::value;
      const Maximum<T, kWidth> best(x, window, j, scale, shift, count);
      V gradient[kWidth];
      DENSE_UNROLL for (int v = 0; v < kWidth; v++) gradient[v] =
          load(g + j + v * kLanes<T>, count);
      for (int64_t i = 0; i < window.count; i++) {
        if (window.row[i] < band.begin || window.row[i] >= band.end) continue;
        Acc<T>* target = da + (window.pixel[i] - first_pixel) * ld + j;
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
  Pixels<const T> grad, x;
  const A *mean, *scale, *shift;
  Pixels<T> grad_x;
  A* sums;
};

template <class T>
void backward_kernel(const BackwardArguments<T>& args) {
  using A = Acc<T>;
  const Pixels<const T>&x = args.x, &grad = args.grad;
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
      const Range band = part_of(x.height, per_image, i % per_image);
      const int64_t pixels = band.size() * x.width;
      std::fill_n(da, pixels * ld, A{0});
      // Row h belongs to the windows of output lines h/2 and (h + 1)/2.
      for (int64_t oh = band.begin / 2; oh <= std::min(band.end / 2, grad.height - 1); oh++) {
        scatter_line(grad, x, image, oh, band, scale, shift, da, ld);
      }
      const int64_t first = (image * x.height + band.begin) * x.width;
      mask_rows<Output::kWriteScaled, 1>(da, ld, x.at(first), x.stride, pixels, x.channels, mean,
                                         scale, shift, args.grad_x.at(first), args.grad_x.stride,
                                         sums.row(part), sums.ld());
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
    const auto xs = pixels<const T>(x, "x");
    const int64_t n = xs.channels;
    const BackwardArguments<T> args{pixels<const T>(grad, "grad", pooled_shape(xs), n),
                                    xs,
                                    channels<const A>(mean, "mean", n),
                                    channels<const A>(scale, "scale", n),
                                    channels<const A>(shift, "shift", n),
                                    pixels<T>(grad_x, "grad_x", xs, n),
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
