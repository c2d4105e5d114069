// mean[c], var[c] = mean and biased variance of x[..., c].
//
// x [N, H, W, C] with any pixel stride; mean, var [C]. Moves C elements per pixel. A thread holds a
// few pixels in registers and goes over them twice: for their mean, and for their squared
// deviations from it. In addition, each block writes a row of moments.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "grid_moments.cuh"
#include "vector.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 512;
constexpr int kUnits = kWarp;  // the maximum units of a pixel per block
constexpr int kBatch = 8;      // pixels that a thread loads at a time

constexpr int shared_bytes(int elements) {
  return SharedMemory::bytes_of(kThreads * elements * int64_t{sizeof(Moments)}) +
         SharedMemory::bytes_of(GridMoments::scratch(kThreads) * int64_t{sizeof(float)});
}

template <class T>
struct Arguments {
  Pixels<const T> x;
  GridMoments moments;
  int bytes;   // bytes per access
  int units;   // accesses per pixel
  int chunks;  // near-equal parts of the units; a block takes one of them
  int groups;  // groups of a block's threads; each takes one pixel at a time
};

// Thread t of a block takes unit t % units of the block's chunk and belongs to group t / units.
template <class T, int kBytes>
__device__ __forceinline__ void run(const Arguments<T>& args) {
  using V = Vector<T, kBytes>;
  SharedMemory shared;
  auto* parts = shared.take<Moments>(kThreads * V::kSize);
  auto* memory = shared.take<float>(GridMoments::scratch(kThreads));
  const Range chunk = part_of(args.units, args.chunks, block_x());
  const int units = static_cast<int>(chunk.size()), group = thread_index() / units;
  const int64_t c = (chunk.begin + thread_index() % units) * V::kSize;
  const int64_t pixels = args.x.count(), distance = int64_t{args.groups} * grid_y();

  Moments total[V::kSize];
  int64_t next = group < args.groups ? int64_t{block_y()} * args.groups + group : pixels;
  for (; next < pixels; next += kBatch * distance) {
    Bytes<kBytes> x[kBatch];
    float count = 0;
    DENSE_EXT_UNROLL for (int k = 0; k < kBatch; k++) {
      if (next + k * distance >= pixels) continue;
      x[k] = load_bytes<kBytes>(args.x.at(next + k * distance) + c);
      count += 1;
    }
    float mean[V::kSize] = {}, m2[V::kSize] = {};
    DENSE_EXT_UNROLL for (int k = 0; k < kBatch; k++) {
      if (next + k * distance >= pixels) continue;
      const V values(x[k]);
      DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) mean[i] += values.value[i];
    }
    DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) mean[i] /= count;
    DENSE_EXT_UNROLL for (int k = 0; k < kBatch; k++) {
      if (next + k * distance >= pixels) continue;
      const V values(x[k]);
      DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) {
        m2[i] += (values.value[i] - mean[i]) * (values.value[i] - mean[i]);
      }
    }
    DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) total[i].merge({count, mean[i], m2[i]});
  }

  // Merges the groups' moments in a tree.
  Moments* const part = parts + thread_index();
  DENSE_EXT_UNROLL for (int i = 0; i < V::kSize; i++) part[i * kThreads] = total[i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (group >= half || group + half >= args.groups) continue;
    for (int i = 0; i < V::kSize; i++) part[i * kThreads].merge(part[i * kThreads + half * units]);
  }
  sync_threads();
  const int columns = units * V::kSize, thread = thread_index();
  Moments mine;
  if (thread < columns) mine = parts[thread % V::kSize * kThreads + thread / V::kSize];
  args.moments.template leave<kThreads>(mine, chunk.begin * V::kSize, columns, memory);
}

template <class T>
__global__ void __launch_bounds__(kThreads) channel_stats_kernel(const Arguments<T> args) {
  for_width<T>(args.bytes, [&](auto width) { run<T, decltype(width)::value>(args); });
}

}  // namespace

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const MomentsTo to = moments_to(mean, var, xs.channels);
    if (xs.count() == 0) {
      zero(mean);
      zero(var);
      return;
    }
    const int bytes = AccessBytes().add(xs), elements = bytes / static_cast<int>(sizeof(T));
    const int64_t units = xs.channels / elements, chunks = ceil_div(units, kUnits);
    const int64_t groups = kThreads / ceil_div(units, chunks);
    const int64_t blocks =
        persistent_blocks(ceil_div(xs.count(), groups), chunks, 1, shared_bytes(elements));
    const Launch on{chunks, blocks, kThreads, shared_bytes(elements)};
    const int width = static_cast<int>(ceil_div(units, chunks)) * elements;
    with_moments(chunks, blocks, width, to, x, [&](const GridMoments& moments) {
      launch<channel_stats_kernel<T>>(on, Arguments<T>{.x = xs,
                                                       .moments = moments,
                                                       .bytes = bytes,
                                                       .units = static_cast<int>(units),
                                                       .chunks = static_cast<int>(chunks),
                                                       .groups = static_cast<int>(groups)});
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
}

}  // namespace dense_ext
