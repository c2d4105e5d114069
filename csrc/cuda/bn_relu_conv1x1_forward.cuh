// The kernel of bn_relu_conv1x1.cu's forward, which has the formulas and the shapes.

#pragma once

#include "grid_moments.cuh"
#include "product.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

template <class T>
struct ForwardArguments {
  Pixels<const T> x;
  const float *scale, *shift;  // [C]
  Weight<const T> weight;      // [B, C]
  Pixels<T> z;
  GridMoments moments;
  int x_bytes, weight_bytes, z_bytes;  // per access
};

// A block computes tiles of z of kPixels x kOut with eight warps, 4 x 2, and steps through C in a
// pipeline of kStages stages. Two blocks share a multiprocessor, so that one loads or stores while
// the other computes. For broad tiles in exact float32, registers suffice for only one block.
template <class Math_, int kOut_, bool kWide_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  static constexpr int kThreads = 256, kOut = kOut_, kPixels = 128, kStages = 3;
  static constexpr int kBlocks = sizeof(T) == 4 && Math::kExact && kOut > 64 ? 1 : 2;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kStageSize = (kPixels + kOut) * kLd;
  static constexpr int kWarpRows = 2, kWarpColumns = kOut / 16;  // fragments per warp
  using Vector = UnitVector<T, kDepth>;
  using Statistics = ColumnMoments<T, kOut, kThreads>;

  static constexpr int kTileSize =
      kStages * kStageSize > kPixels* kOutLd ? kStages * kStageSize : kPixels * kOutLd;
  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kTileSize * int64_t{sizeof(T)}) +
      SharedMemory::bytes_of(kStages * 2 * Vector::kSize * int64_t{sizeof(float)}) +
      SharedMemory::bytes_of(Statistics::kPivots * int64_t{sizeof(T)});
  static_assert(std::max(Statistics::kScratch, GridMoments::scratch(kThreads)) *
                    int64_t{sizeof(float)} <=
                kTileSize * int64_t{sizeof(T)});
};

// The phases of a block, and what they share.
template <class Config>
struct ForwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  using Vector = typename Config::Vector;
  using Products = float[Config::kWarpRows][Config::kWarpColumns][4];
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kDepth = Config::kDepth, kLd = Config::kLd;
  static constexpr int kStages = Config::kStages;

  const ForwardArguments<T>& args;
  T* const tiles;        // [kStages][kPixels of x, kOut of W][kDepth]; later z [kPixels][kOut]
  float* const vectors;  // [kStages][scale, shift][kDepth]
  typename Config::Statistics statistics;
  const int first_out, in, outs;  // outs: the block's channels of z
  const Tiles<kPixels, const T> pixels_of_x;
  const Tiles<kPixels, T> pixels_of_z;
  const Rows<const T> weight;

  __device__ ForwardBlock(const ForwardArguments<T>& args, SharedMemory shared)
      : args(args),
        tiles(shared.take<T>(Config::kTileSize)),
        vectors(shared.take<float>(kStages * 2 * Vector::kSize)),
        statistics(shared.take<T>(Config::Statistics::kPivots)),
        first_out(block_x() * kOut),
        in(static_cast<int>(args.x.channels)),
        outs(std::min(int{kOut}, static_cast<int>(args.z.channels) - first_out)),
        pixels_of_x(args.x, 0),
        pixels_of_z(args.z, first_out),
        weight(args.weight.data + first_out * args.weight.out_stride, args.weight.out_stride,
               outs) {}

  __device__ void run() {
    const int64_t pixels = args.x.count();
    const int tile_count = static_cast<int>((pixels + kPixels - 1) / kPixels);
    const int rows_of_last = static_cast<int>(pixels - int64_t{tile_count - 1} * kPixels);
    for (int tile = block_y(); tile < tile_count; tile += grid_y()) {
      const int rows = tile + 1 < tile_count ? kPixels : rows_of_last;
      const Rows<const T> x = pixels_of_x(tile, rows);
      Products z = {};
      pipeline<kStages>((in + kDepth - 1) / kDepth,
                        [&](int step, int stage) { load(x, step, stage); },
                        [&](int step, int stage) { activate(step, stage); },
                        [&](int, int stage) { multiply(z, stage); });
      store(z, pixels_of_z(tile, rows));
      sync_threads();
    }
    if (args.moments.rows) {
      auto* const memory = reinterpret_cast<float*>(tiles);
      args.moments.template leave<kThreads>(statistics.merged(memory), first_out, outs, memory);
    }
  }

  // Loads x and W for a step, and scale and shift for the next step, which are then complete one
  // barrier before its x is.
  __device__ __forceinline__ void load(const Rows<const T>& x, int step, int stage) const {
    T* const to = tiles + stage * Config::kStageSize;
    const int c = step * kDepth;
    copy_tile<kPixels, kDepth, kThreads, Config::kWide>(to, kLd, in - c, args.x_bytes, x.from(c));
    copy_tile<kOut, kDepth, kThreads, Config::kWide>(to + kPixels * kLd, kLd, in - c,
                                                     args.weight_bytes, weight.from(c));
    if (step == 0) load_vectors(0, 0);
    load_vectors(c + kDepth, stage == kStages - 1 ? 0 : stage + 1);
  }
  __device__ __forceinline__ void load_vectors(int c, int stage) const {
    float* scale = vectors + stage * 2 * Vector::kSize;
    copy_vector<kDepth, kThreads>(scale, args.scale, c, in, Vector::place);
    copy_vector<kDepth, kThreads>(scale + Vector::kSize, args.shift, c, in, Vector::place);
  }

  // Activates x in place. In a wide kernel each thread takes the units that it copied itself, which
  // needs no barrier; the first step waits for the vectors.
  __device__ __forceinline__ void activate(int step, int stage) const {
    if (!Config::kWide || step == 0) sync_threads();
    T* x = tiles + stage * Config::kStageSize;
    const float* vector = vectors + stage * 2 * Vector::kSize;
    const Units<T, kDepth, kThreads> units;
    units.for_columns([&](int c, int) {
      float scale[Vector::kElements], shift[Vector::kElements];
      Vector::load(scale, vector, c);
      Vector::load(shift, vector + Vector::kSize, c);
      units.template for_rows<kPixels>([&](int r, int) {
        auto* const at = unit_at(x + r * kLd + c);
        store_shared(at, activated<T>(load_shared(at), scale, shift));
      });
    });
  }

  // z += x @ W^T over the depth of a stage.
  __device__ __forceinline__ void multiply(Products& z, int stage) const {
    const RowFragment<T> x_rows([](int r) { return r * kLd; });
    const ColumnFragments<T> columns(kLd);
    const T* x = tiles + stage * Config::kStageSize;
    const auto add = [&](int k) {
      uint32_t a[Config::kWarpRows][4];
      DENSE_EXT_UNROLL for (int i = 0; i < Config::kWarpRows; i++) {
        x_rows.load(a[i], x + (warp_row() + 16 * i) * kLd + k);
      }
      DENSE_EXT_UNROLL for (int j = 0; j < Config::kWarpColumns; j += 2) {
        uint32_t b[2][2];
        columns.load(b[0], b[1], x + (kPixels + warp_column() + 8 * j) * kLd + k, kLd);
        dense_ext::multiply<Math>(z, a, b, j);
      }
    };
    if constexpr (sizeof(T) == 2) {
      DENSE_EXT_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) add(k);
    } else {  // registers suffice for only one at a time
      DENSE_EXT_NO_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) add(k);
    }
  }

  // Stores a tile of z through the pipeline's memory, and adds it to the statistics.
  __device__ __forceinline__ void store(const Products& z, const Rows<T>& to) {
    T* const of_warp = tiles + warp_row() * Config::kOutLd + warp_column();
    for_pairs(z, [&](int row, int column, float left, float right) {
      store_pair(of_warp + row * Config::kOutLd + column, left, right);
    });
    sync_threads();
    store_tile<kPixels, kOut, kThreads, Config::kWide>(tiles, Config::kOutLd, outs, args.z_bytes,
                                                       to);
    if (args.moments.rows) {
      statistics.template add<kPixels>(tiles, Config::kOutLd, [&](int r) { return r < to.count; });
    }
  }

  // The warp's position in z.
  __device__ static int warp_row() { return warp_index() / 2 * 32; }
  __device__ static int warp_column() { return warp_index() % 2 * (kOut / 2); }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    forward_kernel(const ForwardArguments<typename Config::T> args) {
  ForwardBlock<Config>(args, SharedMemory()).run();
}

template <class Config>
void run_forward(ForwardArguments<typename Config::T> args, const Tensor& like,
                 const MomentsTo& to) {
  static_assert(Config::kSharedBytes <= kSmallestSharedBytes);
  const int64_t columns = ceil_div(args.z.channels, Config::kOut);
  const int64_t blocks = persistent_blocks(ceil_div(args.x.count(), Config::kPixels), columns,
                                           Config::kBlocks, Config::kSharedBytes);
  with_moments(columns, blocks, Config::kOut, to, like, [&](const GridMoments& moments) {
    args.moments = moments;
    launch<forward_kernel<Config>>({columns, blocks, Config::kThreads, Config::kSharedBytes}, args);
  });
}

}  // namespace
}  // namespace dense_ext
