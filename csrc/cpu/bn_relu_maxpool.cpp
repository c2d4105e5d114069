// Forward:  y = max over 3x3 windows, 2 apart, of relu(scale*x + shift); padding never wins.
// Backward: the first maximum of each window in row-major order takes its gradient;
//           g = the sum of what a pixel took where scale*x + shift > 0, else 0
//           grad_x = scale*g;  sums = [sum g, sum g*(x - mean)]
//
// x, grad_x [N, H, W, C], y, grad [N, (H-1)/2 + 1, (W-1)/2 + 1, C], pixels their own strides apart.
// Moves 5/4 C elements an input pixel forward, 9/4 C backward: the activations and the windows'
// maxima are found anew from x, in cache.

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "reduce.h"

namespace dense_ext {
namespace {

// Scratch for the gradients of a band of input rows.
constexpr int64_t kBandBytes = 256 << 10;

// Rows (or columns) [begin, end) of the input in window o of n, and where the window's 3 would
// start: a position is 0, 1 or 2 from there.
inline Range window(int64_t o, int64_t n) {
  return {std::max<int64_t>(0, 2 * o - 1), std::min(n, 2 * o + 2)};
}

// The window's maximum, and its position in the window (0 to 8) as a number.
template <class T>
struct Maximum {
  Vector<T> value, position;
};

template <class T, class Count>
Maximum<T> find_maximum(const Pixels<const T>& x, int64_t image, int64_t oh, int64_t ow, int64_t j,
                        Vector<T> scale, Vector<T> shift, Count count) {
  using V = Vector<T>;
  const Range rows = window(oh, x.height), columns = window(ow, x.width);
  Maximum<T> best{V{} - std::numeric_limits<Acc<T>>::infinity(), V{}};
  for (int64_t h = rows.begin; h < rows.end; h++) {
    for (int64_t w = columns.begin; w < columns.end; w++) {
      const V a = relu(scale * load(x.at((image * x.height + h) * x.width + w) + j, count) + shift);
      const V position = V{} + static_cast<Acc<T>>((h - 2 * oh + 1) * 3 + (w - 2 * ow + 1));
      const auto wins = a > best.value || a != a;
      best.value = wins ? a : best.value;
      best.position = wins ? position : best.position;
    }
  }
  return best;
}

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
      const int64_t line = p / y.width, image = line / y.height, oh = line % y.height;
      for_vectors<T>(x.channels, [&](int64_t j, auto count) {
        const auto best = find_maximum<T>(x, image, oh, p % y.width, j, load(scale + j),
                                          load(shift + j), count);
        store(y.at(p) + j, best.value, count);
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

// da[pixel of the band][c] += the gradients of the windows it is the maximum of, for the windows
// of one output line.
template <class T>
void scatter_line(const Pixels<const T>& grad, const Pixels<const T>& x, int64_t image, int64_t oh,
                  Range band, const Acc<T>* scale, const Acc<T>* shift, Acc<T>* da, int64_t ld) {
  using V = Vector<T>;
  const Range rows = window(oh, x.height);
  const int64_t begin = std::max(rows.begin, band.begin), end = std::min(rows.end, band.end);
  for (int64_t ow = 0; ow < grad.width; ow++) {
    const Range columns = window(ow, x.width);
    const T* g = grad.at((image * grad.height + oh) * grad.width + ow);
    for_vectors<T>(x.channels, [&](int64_t j, auto count) {
      const auto best = find_maximum<T>(x, image, oh, ow, j, load(scale + j), load(shift + j), count);
      const V gv = load(g + j, count);
      for (int64_t h = begin; h < end; h++) {
        for (int64_t w = columns.begin; w < columns.end; w++) {
          const auto position = static_cast<Acc<T>>((h - 2 * oh + 1) * 3 + (w - 2 * ow + 1));
          Acc<T>* target = da + ((h - band.begin) * x.width + w) * ld + j;
          store(target, load(target) + (best.position == position ? gv : V{}));
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
  // Bands of rows of one image; the windows across their edges are looked at from both sides.
  const int64_t line_bytes = x.width * bytes_of<A>(ld);
  const int64_t max_rows = std::max<int64_t>(4, kBandBytes / line_bytes);
  const int64_t per_image = std::min(
      x.height, std::max(ceil_div(x.height, max_rows), ceil_div(num_threads(), x.images)));
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
      // Row h lies in windows h/2 and (h + 1)/2.
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

STABLE_TORCH_LIBRARY_IMPL(dense_ext, CPU, m) {
  m.impl("bn_relu_maxpool_forward", TORCH_BOX(&bn_relu_maxpool_forward));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
}

}  // namespace dense_ext
