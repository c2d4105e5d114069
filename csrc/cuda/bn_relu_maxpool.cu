// Forward:  y = max over 3x3 windows, 2 apart, of relu(scale*x + shift); padding is ignored.
// Backward: the first maximum of each window in row-major order takes the window's gradient;
//           g = the sum of the gradients that a pixel took where scale*x + shift > 0, else 0
//           grad_x = scale*g;  sums = [sum g, sum g*(x - mean)]
// Backward through the norm: first the sums, then grad_x = scale*g + u*x + v.
//
// x, grad_x [N, H, W, C]; y, grad [N, (H-1)/2 + 1, (W-1)/2 + 1, C]; each with its own pixel stride.
//
// Elements moved per input pixel: 5/4 C forward, 9/4 C backward, each from device memory once.
// Blocks that run at the same time share the pixels at the edges of their strips through the L2
// cache. Backward through the norm moves 7/2 C in two passes, because u and v follow from the sums:
// reading x and grad twice moves less than writing, reading and writing grad_x.
//
// A block goes down a strip of an image, whose lines pass through shared memory; it finds each
// window's maximum once. In the backward pass a pixel gathers the gradients of its windows in a
// fixed order. In addition, each block of the backward pass writes a row of sums.

#include <torch/csrc/stable/library.h>

#include "batch_norm.cuh"
#include "reduce.cuh"
#include "strips.cuh"

namespace dense_ext {
namespace {

// [N, (H-1)/2 + 1, (W-1)/2 + 1, C] of x [N, H, W, C]
template <class T>
Pixels<T> pooled_shape(const Pixels<const T>& x) {
  return {nullptr, x.images, (x.height - 1) / 2 + 1, (x.width - 1) / 2 + 1, x.channels, 0};
}

// --- forward ---------------------------------------------------------------------------------

template <class T>
struct ForwardArguments {
  Pixels<const T> x;
  const float *scale, *shift;  // [C]
  Pixels<T> y;
  Strips strips;
  int x_bytes, y_bytes;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const ForwardArguments<T> args) {
  SharedMemory shared;
  const Channels<T> channels(args.x.channels);
  const Ring<T, 0> ring{
      shared.take<T>(Ring<T, 0>::kSize), args.x, args.x_bytes, channels, channels.load(args.scale),
      channels.load(args.shift)};
  for (int64_t i = block_y(); i < args.strips.count(args.y.images); i += grid_y()) {
    const Strip strip(args.y, args.strips, i);
    ring.for_lines(
        strip, [](int) {},
        [&](int l) {
          const int64_t line = strip.image * args.y.height + strip.lines.begin + l;
          ring.for_windows(strip, l, [&](int j, const Maximum<T>& maximum) {
            T* y = args.y.at(line * args.y.width + strip.columns.begin + j);
            channels.store(y, maximum.value, args.y_bytes);
          });
        });
  }
}

void bn_relu_maxpool_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& y) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const auto ys = pixels<T>(y, "y", pooled_shape(xs), xs.channels);
    const ForwardArguments<T> args{.x = xs,
                                   .scale = channels<const float>(scale, "scale", xs.channels),
                                   .shift = channels<const float>(shift, "shift", xs.channels),
                                   .y = ys,
                                   .strips = Strips(ys),
                                   .x_bytes = AccessBytes().add(xs),
                                   .y_bytes = AccessBytes().add(ys)};
    if (xs.count() == 0) return;
    constexpr int kShared = SharedMemory::bytes_of(Ring<T, 0>::kSize * int64_t{sizeof(T)});
    const int64_t chunks = ceil_div(xs.channels, kChannels<T>);
    const int64_t blocks =
        persistent_blocks(args.strips.count(ys.images), chunks, kBlocks, kShared);
    launch<forward_kernel<T>>({chunks, blocks, kThreads, kShared}, args);
  });
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  Pixels<const T> grad, x;
  const float *mean, *scale, *shift;  // [C]
  const float *u, *v;                 // [C]
  Pixels<T> grad_x;                   // data is null if not wanted
  float* rows;                        // [blocks, 2 C]
  Strips strips;
  int grad_bytes, x_bytes, grad_x_bytes;
};

// A cell is the pixels (2i, 2j) to (2i + 1, 2j + 1). It overlaps window (i, j) and the next windows
// on the right and below. A warp takes one cell at a time, once the maxima of both lines of windows
// are known. With kAffine it adds u*x + v to grad_x and computes no sums, to save registers.
template <class T, bool kAffine>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const BackwardArguments<T> args) {
  constexpr int kWindows = Ring<T, 1>::kWindows, kSize = Word<T>::kSize;
  SharedMemory shared;
  const Channels<T> channels(args.x.channels);
  const Ring<T, 1> ring{
      shared.take<T>(Ring<T, 1>::kSize), args.x, args.x_bytes, channels, channels.load(args.scale),
      channels.load(args.shift)};
  // The index of the pixel that takes a window's gradient, one byte per channel, for two lines.
  auto* const takers = shared.take<uint16_t>(2 * kWindows * kWarp);
  const auto takers_of = [&](int l, int j) {
    return takers + (l % 2 * kWindows + j) * kWarp + lane_index();
  };
  Word<T> mean, u, v;
  if constexpr (kAffine) {
    u = channels.load(args.u), v = channels.load(args.v);
  } else {
    mean = channels.load(args.mean);
  }
  float sum_g[kSize] = {}, sum_gx[kSize] = {};

  for (int64_t i = block_y(); i < args.strips.count(args.grad.images); i += grid_y()) {
    const Strip strip(args.grad, args.strips, i);
    // Windows outside the image get a zero gradient, so that they add nothing to any pixel.
    const auto load_grad = [&](int l) {
      const int64_t line = strip.lines.begin + l;
      const int64_t first = (strip.image * args.grad.height + line) * args.grad.width;
      copy_tile<kWindows, kChannels<T>, kThreads, false>(
          ring.windows(l + 1), kChannels<T>, channels.chunk_size, args.grad_bytes, [&](int j) {
            const int64_t column = strip.columns.begin + j;
            const bool inside =
                j <= strip.columns.size() && line < args.grad.height && column < args.grad.width;
            return Row<const T>{args.grad.at(first + column) + channels.chunk, inside};
          });
    };
    const auto gather = [&](int l, int j) {
      uint32_t taker[2][2];
      Word<T> grad[2][2];
      DENSE_EXT_UNROLL for (int window = 0; window < 4; window++) {
        const int below = window / 2, right = window % 2;
        taker[below][right] = load_shared(takers_of(l + below, j + right));
        grad[below][right] = load_word(ring.windows(l + 1 + below) + (j + right) * kChannels<T>);
      }
      DENSE_EXT_UNROLL for (int pixel = 0; pixel < 4; pixel++) {
        const int a = pixel / 2, b = pixel % 2;
        const int64_t h = 2 * (strip.lines.begin + l) + a, w = 2 * (strip.columns.begin + j) + b;
        if (h >= args.x.height || w >= args.x.width) continue;
        Word<T> g;
        DENSE_EXT_UNROLL for (int below = 0; below <= a; below++) {
          DENSE_EXT_UNROLL for (int right = 0; right <= b; right++) {
            const uint32_t number = 3 * (a + 1 - 2 * below) + b + 1 - 2 * right;
            DENSE_EXT_UNROLL for (int c = 0; c < kSize; c++) {
              const bool takes = (taker[below][right] >> 8 * c & 0xff) == number;
              g.value[c] += takes ? grad[below][right].value[c] : 0;
            }
          }
        }
        const Word<T> x = load_word(ring.pixel(l + 1, a, 2 * j + 1 + b));
        Word<T> grad_x;
        DENSE_EXT_UNROLL for (int c = 0; c < kSize; c++) {
          grad_x.value[c] = ring.scale.value[c] * g.value[c];
          if constexpr (kAffine) {
            grad_x.value[c] += u.value[c] * x.value[c] + v.value[c];
          } else {
            sum_g[c] += g.value[c];
            sum_gx[c] += g.value[c] * (x.value[c] - mean.value[c]);
          }
        }
        if (!args.grad_x.data) continue;
        channels.store(args.grad_x.at((strip.image * args.x.height + h) * args.x.width + w), grad_x,
                       args.grad_x_bytes);
      }
    };
    ring.for_lines(strip, load_grad, [&](int l) {
      ring.for_windows(strip, l, [&](int j, const Maximum<T>& maximum) {
        store_shared(takers_of(l, j),
                     static_cast<uint16_t>(maximum.index[0] | maximum.index[kSize - 1] << 8));
      });
      sync_threads();
      if (l == 0) return;
      for (int j = warp_index(); j < strip.columns.size(); j += kWarps) gather(l - 1, j);
    });
  }

  if constexpr (kAffine) return;

  // The ring's memory now holds the warps' sums.
  auto* const sums = reinterpret_cast<float*>(ring.stages);
  DENSE_EXT_UNROLL for (int c = 0; c < kSize; c++) {
    float* const sum = sums + warp_index() * 2 * kChannels<T> + lane_index() * kSize + c;
    sum[0] = sum_g[c];
    sum[kChannels<T>] = sum_gx[c];
  }
  sync_threads();
  const int c = thread_index() % kChannels<T>, which = thread_index() / kChannels<T>;
  if (which >= 2 || c >= channels.chunk_size) return;
  float total = 0;
  for (int warp = 0; warp < kWarps; warp++) total += sums[warp * 2 * kChannels<T> + thread_index()];
  store_global(args.rows + (2 * block_y() + which) * args.x.channels + channels.chunk + c, total);
}

// Arguments that this pass does not need are absent, except grad_x.
void run_backward(Pass pass, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mean,
                  const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& u,
                  const std::optional<Tensor>& v, const Tensor& grad_x,
                  const std::optional<Tensor>& sums) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const int64_t n = xs.channels;
    const auto grads = pixels<const T>(grad, "grad", pooled_shape(xs), n);
    const auto grad_xs = pixels<T>(grad_x, "grad_x", xs, n);
    BackwardArguments<T> args{.grad = grads,
                              .x = xs,
                              .mean = channels<const float>(mean, "mean", n),
                              .scale = channels<const float>(scale, "scale", n),
                              .shift = channels<const float>(shift, "shift", n),
                              .u = channels<const float>(u, "u", n),
                              .v = channels<const float>(v, "v", n),
                              .grad_x = grad_xs,
                              .rows = nullptr,
                              .strips = Strips(grads),
                              .grad_bytes = AccessBytes().add(grads),
                              .x_bytes = AccessBytes().add(xs),
                              .grad_x_bytes = AccessBytes().add(grad_xs)};
    if (pass == Pass::kSums) args.grad_x.data = nullptr;
    float* const sum = channels<float>(sums, "sums", 2 * n);
    if (xs.count() == 0) {
      if (sums) zero(*sums);
      return;
    }
    constexpr int kShared =
        SharedMemory::bytes_of(Ring<T, 1>::kSize * int64_t{sizeof(T)}) +
        SharedMemory::bytes_of(2 * Ring<T, 1>::kWindows * kWarp * int64_t{sizeof(uint16_t)});
    const int64_t chunks = ceil_div(n, kChannels<T>);
    const int64_t blocks =
        persistent_blocks(args.strips.count(grads.images), chunks, kBlocks, kShared);
    const Launch on{chunks, blocks, kThreads, kShared};
    if (pass == Pass::kAffine) return launch<backward_kernel<T, true>>(on, args);
    const Tensor rows = scratch(blocks * 2 * n, x);
    args.rows = static_cast<float*>(rows.data_ptr());
    launch<backward_kernel<T, false>>(on, args);
    add_rows(rows, blocks, Sums<T>{.vector = sum, .channels = n});
  });
}

void bn_relu_maxpool_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                              const Tensor& scale, const Tensor& shift, const Tensor& grad_x,
                              const Tensor& sums) {
  const OnDeviceOf device(x);
  run_backward(Pass::kWhole, grad, x, mean, scale, shift, {}, {}, grad_x, sums);
}

void bn_relu_maxpool_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                   const Tensor& var, const Tensor& norm_weight, double eps,
                                   const Tensor& scale, const Tensor& shift, const Tensor& grad_x,
                                   const Tensor& grad_norm_weight, const Tensor& grad_norm_bias) {
  const OnDeviceOf device(x);
  const ThroughNorm norm(x, mean, var, norm_weight, eps, grad_norm_weight, grad_norm_bias);
  run_backward(Pass::kSums, grad, x, mean, scale, shift, {}, {}, grad_x, norm.sums);
  norm.gradient.run();
  run_backward(Pass::kAffine, grad, x, {}, scale, shift, norm.u, norm.v, grad_x, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_maxpool_forward", TORCH_BOX(&bn_relu_maxpool_forward));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&bn_relu_maxpool_backward));
  m.impl("bn_relu_maxpool_norm_backward", TORCH_BOX(&bn_relu_maxpool_norm_backward));
}

}  // namespace dense_ext
