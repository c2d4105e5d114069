// The kernel of bn_relu_pool_conv1x1.cu's forward, which has the formulas and the shapes.

#pragma once

#include "pool_window.cuh"
#include "product.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

template <class T>
struct ForwardArguments {
  Pixels<const T> x;
  const float *scale, *shift;  // [C]
  Weight<const T> weight;      // [K, C]
  Pixels<T> y;
  int x_bytes, weight_bytes, y_bytes;
};

// A block computes tiles of y of kWindows x kOut with eight warps, 2 x 4, and steps through C.
// While it multiplies one step's p by W, it loads the next step's x into registers; then it pools
// that x into the other of two tiles of p. W, which comes from the L2 cache, is copied two steps
// ahead.
template <class Math_, int kOut_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kOut = kOut_, kWindows = 64, kStages = 3;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kUnits = kDepth / kUnit<T>;
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kPooledSize = kWindows * kLd, kWeightSize = kOut * kLd;
  static constexpr int kTileSize = kStages * kWeightSize + 2 * kPooledSize;
  static_assert(kWindows * kUnits == kThreads && kTileSize >= kWindows * kOutLd);

  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kTileSize * int64_t{sizeof(T)}) +
      SharedMemory::bytes_of(kStages * 2 * kDepth * int64_t{sizeof(float)});
};

// The blocks per multiprocessor for which the registers suffice with broad tiles.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBroadBlocks = 1;
#else
constexpr int kBroadBlocks = 2;
#endif

template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kOut > 128 ? kBroadBlocks : 2)
    forward_kernel(const ForwardArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kWindows = Config::kWindows, kOut = Config::kOut, kDepth = Config::kDepth;
  constexpr int kLd = Config::kLd, kStages = Config::kStages;
  SharedMemory shared;
  T* const weights = shared.take<T>(Config::kTileSize);
  T* const pooled = weights + kStages * Config::kWeightSize;
  float* const vectors = shared.take<float>(kStages * 2 * kDepth);

  const int first_out = block_x() * kOut;
  const int outs = std::min(kOut, static_cast<int>(args.y.channels) - first_out);
  const int in = static_cast<int>(args.x.channels), steps = (in + kDepth - 1) / kDepth;

  constexpr int kWarpRows = 2, kWarpColumns = kOut / 32;  // fragments per warp
  const int warp_row = warp_index() / 4 * 32, warp_column = warp_index() % 4 * (kOut / 4);
  const RowFragment<T> p_rows([&](int r) { return (warp_row + r) * kLd; });
  const ColumnFragments<T> weight_columns(kLd);

  const auto copy_weight = [&](int step) {
    const int c = step * kDepth;
    copy_tile<kOut, kDepth, kThreads, false>(
        weights + step % kStages * Config::kWeightSize, kLd, in - c, args.weight_bytes,
        Rows(args.weight.data + first_out * args.weight.out_stride + c, args.weight.out_stride,
             outs));
    float* vector = vectors + step % kStages * 2 * kDepth;
    copy_vector<kDepth, kThreads>(vector, args.scale, c, in);
    copy_vector<kDepth, kThreads>(vector + kDepth, args.shift, c, in);
    copy_async_commit();
  };

  // The thread's row of p, and its unit in each step.
  const int row = first_access<Config::kUnits>() / Config::kUnits;
  const int unit = thread_index() % Config::kUnits * kUnit<T>;

  const int64_t windows = args.y.count(), tile_count = (windows + kWindows - 1) / kWindows;
  for (int64_t tile = block_y(); tile < tile_count; tile += grid_y()) {
    const int64_t first = tile * kWindows;
    const int rows = static_cast<int>(std::min(int64_t{kWindows}, windows - first));
    // Rows past the last window read the last window.
    const T* const corner = args.x.at(corner_of(args.x, first + std::min(row, rows - 1))) + unit;
    Window<T> window;
    const auto load_x = [&](int step) {
      const int c = step * kDepth;
      window.load(args.x, corner + c, in - c - unit, args.x_bytes);
    };
    const auto pool = [&](int step) {
      const float* vector = vectors + step % kStages * 2 * kDepth + unit;
      T* const to = pooled + step % 2 * Config::kPooledSize + row * kLd + unit;
      store_shared(reinterpret_cast<Bytes<16>*>(to),
                   window.template pooled<4>(vector, vector + kDepth));
    };

    float y[kWarpRows][kWarpColumns][4] = {};
    load_x(0);
    copy_weight(0);
    if (steps > 1) copy_weight(1);
    copy_async_wait<0>();
    sync_threads();
    pool(0);
    for (int step = 0; step < steps; step++) {
      copy_async_wait<0>();
      sync_threads();
      if (step + 2 < steps) copy_weight(step + 2);
      if (step + 1 < steps) load_x(step + 1);
      multiply_tiles<Math, kDepth, kLd, kLd>(
          y, p_rows, pooled + step % 2 * Config::kPooledSize, weight_columns,
          weights + step % kStages * Config::kWeightSize + warp_column * kLd);
      if (step + 1 < steps) pool(step + 1);
    }
    sync_threads();

    // The memory of W and p now holds the tile of y.
    for_pairs(y, [&](int r, int c, float left, float right) {
      store_pair(weights + (warp_row + r) * Config::kOutLd + warp_column + c, left, right);
    });
    sync_threads();
    store_tile<kWindows, kOut, kThreads, false>(weights, Config::kOutLd, outs, args.y_bytes,
                                                Rows(args.y, first, rows, first_out));
    sync_threads();
  }
}

template <class Config>
void run_forward(const ForwardArguments<typename Config::T>& args) {
  const int64_t columns = ceil_div(args.y.channels, Config::kOut);
  const int64_t blocks = persistent_blocks(ceil_div(args.y.count(), Config::kWindows), columns, 2,
                                           Config::kSharedBytes);
  launch<forward_kernel<Config>>({columns, blocks, kThreads, Config::kSharedBytes}, args);
}

}  // namespace
}  // namespace dense_ext
