// The kernel of bn_relu_conv3x3.cu's forward, which has the formulas and the shapes.

#pragma once

#include "grid_moments.cuh"
#include "stages.cuh"
#include "taps.cuh"

namespace dense_ext {
namespace {

template <class T>
struct ForwardArguments {
  Pixels<const T> z;
  const float *scale, *shift;  // [B]
  Weight<const T> weight;      // [K, B, 3, 3]
  Pixels<T> y;
  GridMoments moments;
  Patches patches;
  int z_bytes, weight_bytes, y_bytes;  // per access
  int kept;  // chunks of the weight in shared memory: all, or one at a time
};

// A block computes kOut channels of patches of kPixels slots, and steps through B in chunks of
// kDepth. Producer warps load a chunk and activate it, while consumer warps multiply the one before
// and store y. A consumer warp has a stack of kStack lines and one of kParts parts of the channels.
template <class Math_, int kOut_, int kStack_, int kParts_, bool kWide_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  static constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;
  static constexpr int kStack = kStack_, kParts = kParts_;
  static constexpr int kPixels = kConsumers / kWarp / kParts * 16 * kStack, kOut = kOut_;
  // Enough for the bordered patch of eight images of 8 x 8 in 512 slots, or one of 16 x 16 in 256.
  static constexpr int kBordered = kPixels == 512 ? 736 : kPixels == 256 ? 360 : 200;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kStageSize =
      kBordered * kLd > kPixels* kOutLd ? kBordered * kLd : kPixels * kOutLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kLd), kWeightSize = kTaps * kTapSize;
  using Places = dense_ext::Places<kPixels, kBordered, kThreads, kProducers>;
  using Vector = UnitVector<T, kDepth>;
  using Statistics = ColumnMoments<T, kOut, kConsumers>;
  static_assert(std::max(Statistics::kScratch, GridMoments::scratch(kThreads)) * sizeof(float) <=
                2 * kStageSize * sizeof(T));

  static constexpr int64_t chunks(int64_t channels) { return ceil_div(channels, kDepth); }
  // With `kept` chunks of the weight in shared memory.
  static constexpr int shared_bytes(int64_t kept) {
    return SharedMemory::bytes_of(2 * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kept * kWeightSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(2 * 2 * Vector::kSize * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(Places::kInts * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(Statistics::kPivots * int64_t{sizeof(T)});
  }
};

// The phases of a block, and what they share.
template <class Config>
struct ForwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  using Vector = typename Config::Vector;
  static constexpr int kConsumers = Config::kConsumers, kProducers = Config::kProducers;
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kDepth = Config::kDepth, kLd = Config::kLd;
  static constexpr int kBordered = Config::kBordered, kOutLd = Config::kOutLd;
  static constexpr int kColumns = kOut / 8 / Config::kParts;  // fragments per warp
  using Products = float[Config::kStack][kColumns][4];
  using Barriers = StageBarriers<kThreads, 2>;
  enum { kAmongProducers = Barriers::kOwn, kAmongConsumers };

  const ForwardArguments<T>& args;
  const Patches& patches;
  T* const stages;       // [2][kBordered][kDepth] of z; one of them later y [kPixels][kOut]
  T* const weights;      // [kept][kTaps][kOut][kDepth]
  float* const vectors;  // [2][scale, shift][kDepth]
  const typename Config::Places places;
  typename Config::Statistics statistics;
  const int in, chunks, first_out, outs;  // outs: the block's channels of y

  __device__ ForwardBlock(const ForwardArguments<T>& args, SharedMemory shared)
      : args(args),
        patches(args.patches),
        stages(shared.take<T>(2 * Config::kStageSize)),
        weights(shared.take<T>(args.kept * Config::kWeightSize)),
        vectors(shared.take<float>(2 * 2 * Vector::kSize)),
        places(shared.take<int>(Config::Places::kInts), args.patches),
        statistics(shared.take<T>(Config::Statistics::kPivots)),
        in(static_cast<int>(args.z.channels)),
        chunks(static_cast<int>(Config::chunks(in))),
        first_out(block_x() * kOut),
        outs(std::min(int{kOut}, static_cast<int>(args.y.channels) - first_out)) {}

  __device__ void run() {
    if (thread_index() < kConsumers) {
      consume();
    } else {
      produce();
    }
    sync_threads();
    if (args.moments.rows) {
      auto* const memory = reinterpret_cast<float*>(stages);
      args.moments.template leave<kThreads>(statistics.merged(memory), first_out, outs, memory);
    }
  }

  // A step is a chunk of a patch; its stage is step % 2.
  __device__ int steps() const {
    return (patches.count - block_y() + grid_y() - 1) / grid_y() * chunks;
  }

  // --- producers -------------------------------------------------------------------------------

  __device__ void produce() const {
    int patch = block_y(), parity = 0, chunk = 0;
    const int count = steps();
    for (int step = 0; step < count; step++) {
      const int stage = step % 2;
      if (keeps_weight() && step >= 2) Barriers::wait_until_empty(stage);
      if (chunk == 0) {
        places.locate(patch, parity, producer());
        sync_named<kProducers>(kAmongProducers);
      }
      load(parity, chunk, stage);
      copy_async_commit();
      copy_async_wait<0>();
      sync_named<kProducers>(kAmongProducers);
      activate(parity, stage);
      if (!keeps_weight()) {
        if (step > 0) Barriers::wait_until_empty(1 - stage);
        load_taps<kOut, kDepth, kProducers>(weights, kLd, args.weight, args.weight_bytes, first_out,
                                            chunk * kDepth, producer());
        copy_async_commit();
        copy_async_wait<0>();
      }
      Barriers::filled(stage);
      if (++chunk == chunks) chunk = 0, parity = 1 - parity, patch += grid_y();
    }
  }

  // Loads a chunk of a bordered patch, and its scale and shift.
  __device__ __forceinline__ void load(int parity, int chunk, int stage) const {
    const int c = chunk * kDepth;
    copy_tile<kBordered, kDepth, kProducers, Config::kWide>(
        stages + stage * Config::kStageSize, kLd, in - c, args.z_bytes,
        ChosenRows(Rows(args.z, places.origin(parity), 0, c),
                   [&](int p) { return places.source(parity, p); }),
        producer());
    float* const vector = vectors + stage * 2 * Vector::kSize;
    copy_vector<kDepth, kProducers>(vector, args.scale, c, in, Vector::place, producer());
    copy_vector<kDepth, kProducers>(vector + Vector::kSize, args.shift, c, in, Vector::place,
                                    producer());
  }

  // Activates z in place; outside the images it stays zero.
  __device__ __forceinline__ void activate(int parity, int stage) const {
    const float* scale = vectors + stage * 2 * Vector::kSize;
    activate_rows<kBordered, kDepth, kProducers>(
        stages + stage * Config::kStageSize, kLd, scale, scale + Vector::kSize,
        [&](int p) { return places.source(parity, p) >= 0; }, producer());
  }

  // --- consumers -------------------------------------------------------------------------------

  __device__ void consume() {
    if (keeps_weight()) {
      for (int chunk = 0; chunk < chunks; chunk++) {
        load_taps<kOut, kDepth, kConsumers>(weights + chunk * Config::kWeightSize, kLd, args.weight,
                                            args.weight_bytes, first_out, chunk * kDepth);
      }
      copy_async_commit();
      copy_async_wait<0>();
    }
    sync_named<kConsumers>(kAmongConsumers);
    const RowFragment<T> rows([&](int r) { return patches.corner(warp_row() + r) * kLd; });
    const int ahead = keeps_weight() ? 2 : 1;  // steps until the producers want a stage again
    const int count = steps();
    int step = 0;
    for (int parity = 0; step < count; parity = 1 - parity) {
      Products y = {};
      for (int chunk = 0; chunk < chunks; chunk++, step++) {
        const int stage = step % 2;
        Barriers::wait_until_full(stage);
        multiply(y, rows, stage, keeps_weight() ? chunk : 0);
        if (chunk + 1 == chunks) store(y, stages + stage * Config::kStageSize, parity);
        if (step + ahead < count) Barriers::emptied(stage);
      }
    }
  }

  // y += the products of a chunk, over all taps.
  __device__ __forceinline__ void multiply(Products& y, const RowFragment<T>& rows, int stage,
                                           int place) const {
    const ColumnFragments<T> columns(kLd);
    const T* weight = weights + place * Config::kWeightSize;
    const auto load_tap = [&](uint32_t (&b)[2][2], int tap, int k, int j) {
      const T* of_tap = weight + tap * Config::kTapSize;
      columns.load(b[0], b[1], of_tap + (warp_column() + 8 * j) * kLd + k, kLd);
    };
    multiply_taps<Math, kDepth, sizeof(T) == 4>(y, rows, stages + stage * Config::kStageSize, kLd,
                                                patches.line, kDepth, load_tap);
  }

  // Stores a patch of y through the memory of its last chunk, and adds it to the statistics.
  __device__ __forceinline__ void store(const Products& y, T* tile, int parity) {
    sync_named<kConsumers>(kAmongConsumers);
    for_pairs(y, [&](int row, int column, float left, float right) {
      store_pair(tile + (warp_row() + row) * kOutLd + warp_column() + column, left, right);
    });
    sync_named<kConsumers>(kAmongConsumers);
    store_tile<kPixels, kOut, kConsumers, Config::kWide>(
        tile, kOutLd, outs, args.y_bytes,
        ChosenRows(Rows(args.y, places.origin(parity), 0, first_out),
                   [&](int r) { return places.center(parity, r); }));
    if (args.moments.rows) {
      statistics.template add<kPixels>(tile, kOutLd,
                                       [&](int r) { return places.center(parity, r) >= 0; });
    }
  }

  __device__ bool keeps_weight() const { return args.kept == chunks; }
  __device__ static int producer() { return thread_index() - kConsumers; }
  // A consumer warp's position in y.
  __device__ static int warp_row() { return warp_index() / Config::kParts * 16 * Config::kStack; }
  __device__ static int warp_column() { return warp_index() % Config::kParts * 8 * kColumns; }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const ForwardArguments<typename Config::T> args) {
  ForwardBlock<Config>(args, SharedMemory()).run();
}

template <class Config>
void run_forward(ForwardArguments<typename Config::T> args, const Tensor& like,
                 const MomentsTo& to) {
  const int64_t columns = ceil_div(args.y.channels, Config::kOut);
  const int64_t chunks = Config::chunks(args.z.channels);
  const bool keep = Config::shared_bytes(chunks) <= current_device().shared_bytes;
  args.kept = static_cast<int>(keep ? chunks : 1);
  args.patches = patches_of<Config>(args.z);
  const int shared = Config::shared_bytes(args.kept);
  const int64_t blocks = persistent_blocks(args.patches.count, columns, 1, shared);
  with_moments(columns, blocks, Config::kOut, to, like, [&](const GridMoments& moments) {
    args.moments = moments;
    launch<forward_kernel<Config>>({columns, blocks, Config::kThreads, shared}, args);
  });
}

}  // namespace
}  // namespace dense_ext
