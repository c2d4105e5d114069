// Gradients without a convolution:
//   affine_gradient:   out = grad + u*x + v
//   scaled_accumulate: out += scale*grad
//
// grad, x, out [N, H, W, C], each with its own pixel stride (out may be grad itself); u, v,
// scale [C]. One kernel, out = base + (factor*x + offset), computes both; it moves 3 C elements per
// pixel.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "launch.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 256, kBlocks = 3;  // blocks per multiprocessor
constexpr int kBatch = 4;                   // pixels that a thread loads at a time

template <class T>
struct Arguments {
  Pixels<const T> base, x;
  const float *factor, *offset;  // [C]; a null offset is zero
  Pixels<T> out;
  int bytes;         // bytes per access
  int units;         // accesses per pixel
  int64_t distance;  // from one of a thread's pixels to the next
};

// Thread t of the grid takes unit t % units of pixel t / units and of every distance-th pixel after
// it. These are always the same channels, so it keeps their factors in registers.
template <class T, int kBytes>
__device__ __forceinline__ void run(const Arguments<T>& args) {
  using V = Vector<T, kBytes>;
  const int thread = block_x() * kThreads + thread_index(), first = thread / args.units;
  if (first >= args.distance) return;
  const int64_t c = int64_t{thread % args.units} * V::kSize;
  float factor[V::kSize], offset[V::kSize];
  DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) {
    factor[i] = load_global(args.factor + c + i);
    offset[i] = args.offset ? load_global(args.offset + c + i) : 0;
  }
  const int64_t pixels = args.out.count();
  for (int64_t next = first; next < pixels; next += kBatch * args.distance) {
    Bytes<kBytes> base[kBatch], x[kBatch];
    DENSE_EXT_UNROLL for (int k = 0; k < kBatch; k++) {
      const int64_t pixel = next + k * args.distance;
      if (pixel >= pixels) continue;
      base[k] = load_bytes<kBytes>(args.base.at(pixel) + c);
      x[k] = load_bytes<kBytes>(args.x.at(pixel) + c);
    }
    DENSE_EXT_UNROLL for (int k = 0; k < kBatch; k++) {
      const int64_t pixel = next + k * args.distance;
      if (pixel >= pixels) continue;
      V out(base[k]);
      const V values(x[k]);
      DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) {
        out.value[i] += factor[i] * values.value[i] + offset[i];
      }
      store_bytes(args.out.at(pixel) + c, out.stored());
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) affine_kernel(const Arguments<T> args) {
  for_width<T>(args.bytes, [&](auto width) { run<T, decltype(width)::value>(args); });
}

template <class T>
void affine(const Pixels<const T>& base, const Pixels<const T>& x, const float* factor,
            const float* offset, const Pixels<T>& out) {
  if (out.count() == 0) return;
  const int bytes = AccessBytes().add(base).add(x).add(out);
  const int64_t units = out.channels * int64_t{sizeof(T)} / bytes;
  // At least enough threads for one pixel, whatever C is.
  const int64_t blocks =
      std::max(ceil_div(units, kThreads),
               persistent_blocks(ceil_div(out.count() * units, kThreads), 1, kBlocks, 0));
  launch<affine_kernel<T>>({blocks, 1, kThreads},
                           Arguments<T>{.base = base,
                                        .x = x,
                                        .factor = factor,
                                        .offset = offset,
                                        .out = out,
                                        .bytes = bytes,
                                        .units = static_cast<int>(units),
                                        .distance = blocks * kThreads / units});
}

}  // namespace

void affine_gradient(const Tensor& grad, const Tensor& x, const Tensor& u, const Tensor& v,
                     const Tensor& out) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const auto grads = pixels<const T>(grad, "grad", xs, xs.channels);
    const auto outs = pixels<T>(out, "out", xs, xs.channels);
    affine<T>(grads, xs, channels<const float>(u, "u", xs.channels),
              channels<const float>(v, "v", xs.channels), outs);
  });
}

void scaled_accumulate(const Tensor& grad, const Tensor& scale, const Tensor& out) {
  const OnDeviceOf device(out);
  dispatch(out, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto outs = pixels<T>(out, "out");
    const auto grads = pixels<const T>(grad, "grad", outs, outs.channels);
    affine<T>(pixels<const T>(out, "out"), grads,
              channels<const float>(scale, "scale", outs.channels), nullptr, outs);
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("affine_gradient", TORCH_BOX(&affine_gradient));
  m.impl("scaled_accumulate", TORCH_BOX(&scaled_accumulate));
}

}  // namespace dense_ext
