// The kernel of bn_relu_conv1x1.cu's backward, which has the formulas and the shapes.

#pragma once

#include "product.cuh"
#include "reduce.cuh"
#include "stages.cuh"
#include "thread_units.cuh"

namespace dense_ext {
namespace {

template <class T>
struct BackwardArguments {
  Pixels<const T> grad_bn, z;
  const float *z_scale, *z_u, *z_v;  // [B]
  Pixels<const T> x;
  const float *mean, *scale, *shift;  // [C]
  Weight<const T> weight;             // [B, C]
  Pixels<T> grad_x;
  float* rows;  // [blocks, 2 C + B C]: sums, and dW if wanted
  int64_t row_size;
  bool wants_weight;
  int grad_bn_bytes, z_bytes, x_bytes, weight_bytes, grad_x_bytes;  // per access
};

// A block takes kIn channels of x and all of B, at most kOut, and goes through tiles of kPixels.
// Producer warps load a tile into registers, form dz, activate x, and leave the results in shared
// memory, while consumer warps multiply the tile before. The consumers divide da [kPixels, kIn]
// 2 x 4 and dW [kOut, kIn] 4 x 2, of whose rows each of the four takes every fourth 16.
template <class Math_, int kOut_, bool kWide_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  template <bool kOther>
  using OfWidth = Backward<Math, kOut_, kOther>;
  static constexpr int kOut = kOut_, kIn = 64, kPixels = 32;
  // Wider products take so many of the consumers' registers that fewer are left for producers.
  static constexpr bool kNarrowProducts = sizeof(T) == 2 && kOut <= 128;
  static constexpr int kConsumers = 256, kProducers = kNarrowProducts ? 256 : 128;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kAhead = kNarrowProducts ? 2 : 1;  // tiles in a producer's registers
  static constexpr bool kKeepsVectors = kNarrowProducts;  // in registers
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;  // tiles in shared memory
  using OutLayout = TileLayout<T, kOut>;
  using InLayout = TileLayout<T, kIn>;
  // dz; x, grad_x and the activated x.
  static constexpr int kStageSize = kPixels * (OutLayout::kLd + 3 * InLayout::kLd);
  static_assert(kOut * InLayout::kLd <= kStageSize);  // W passes through a stage
  using OutVector = UnitVector<T, kOut>;
  using InVector = UnitVector<T, kIn>;
  static constexpr int kVectors = 3 * OutVector::kSize + 3 * InVector::kSize;
  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kStages * kStageSize * int64_t{sizeof(T)}) +
      SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
      SharedMemory::bytes_of(2 * 2 * kIn * int64_t{sizeof(float)});
};

// The phases of a block, and what they share.
template <class Config>
struct BackwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  static constexpr int kConsumers = Config::kConsumers, kProducers = Config::kProducers;
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kIn = Config::kIn, kStages = Config::kStages;
  using OutLayout = typename Config::OutLayout;
  using InLayout = typename Config::InLayout;
  using OutVector = typename Config::OutVector;
  using InVector = typename Config::InVector;
  using OutFragments = TileFragments<T, kOut>;
  using InFragments = TileFragments<T, kIn>;
  using OutUnits = ThreadUnits<T, kPixels, kOut, kProducers>;
  using InUnits = ThreadUnits<T, kPixels, kIn, kProducers>;
  static constexpr bool kWide = Config::kWide;
  // Fragments per warp.
  static constexpr int kDataColumns = 2, kWeightRows = kOut / 64, kWeightColumns = 4;
  using Barriers = StageBarriers<kThreads, kStages>;
  enum { kLoaded = Barriers::kOwn };  // the barrier until the vectors and W are in shared memory

  // A tile in shared memory. The new grad_x replaces the old one.
  struct Stage {
    T* dz;                      // [kPixels][kOut]
    T *x, *grad_x, *activated;  // [kPixels][kIn]
    __device__ explicit Stage(T* begin)
        : dz(begin),
          x(dz + kPixels * OutLayout::kLd),
          grad_x(x + kPixels * InLayout::kLd),
          activated(grad_x + kPixels * InLayout::kLd) {}
  };

  // A producer's part of a tile in registers.
  struct Loaded {
    OutUnits grad_bn, z;
    InUnits x, grad_x;
  };
  // The vectors of a producer's channels.
  struct Vectors {
    typename OutUnits::Vector z_scale, z_u, z_v;
    typename InUnits::Vector scale, shift;
  };
  // The vectors of a consumer's columns of da.
  struct ColumnVectors {
    Float2 mean[kDataColumns], scale[kDataColumns], shift[kDataColumns];
  };

  const BackwardArguments<T>& args;
  T* const stages;
  float *const z_scale, *const sums;
  const int first_in, out, ins;  // ins: the block's channels of x
  const int pixels, tile_count;
  uint32_t w[kOut / Math::kDepth][kDataColumns][2];  // W for the warp's columns of da
  float dw[kWeightRows][kWeightColumns][4] = {};     // the warp's part of dW
  float sum_g[kDataColumns][2] = {}, sum_gx[kDataColumns][2] = {};

  __device__ BackwardBlock(const BackwardArguments<T>& args, SharedMemory shared)
      : args(args),
        stages(shared.take<T>(kStages * Config::kStageSize)),
        z_scale(shared.take<float>(Config::kVectors)),
        sums(shared.take<float>(2 * 2 * kIn)),
        first_in(block_x() * kIn),
        out(static_cast<int>(args.z.channels)),
        ins(std::min(int{kIn}, static_cast<int>(args.x.channels) - first_in)),
        pixels(static_cast<int>(args.x.count())),
        tile_count((pixels - 1) / kPixels + 1) {}

  __device__ void run() {
    load_vectors();
    if (thread_index() < kConsumers) {
      consume();
    } else {
      produce();
    }
    sync_threads();
    float* row = args.rows + block_y() * args.row_size + first_in;
    add_column_sums<kThreads, 2, kIn>(sums, ins, row, row + args.x.channels);
  }

  // The tiles of a block take the stages in turn.
  __device__ bool is_partial(int tile) const { return tile * kPixels + kPixels > pixels; }
  __device__ Stage stage_at(int stage) const { return Stage(stages + stage * Config::kStageSize); }
  __device__ static int after(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }

  __device__ __forceinline__ void load_vectors() const {
    copy_vector<kOut, kThreads>(z_scale, args.z_scale, 0, out, OutVector::place);
    copy_vector<kOut, kThreads>(z_u(), args.z_u, 0, out, OutVector::place);
    copy_vector<kOut, kThreads>(z_v(), args.z_v, 0, out, OutVector::place);
    copy_vector<kIn, kThreads>(mean(), args.mean, first_in, args.x.channels, InVector::place);
    copy_vector<kIn, kThreads>(scale(), args.scale, first_in, args.x.channels, InVector::place);
    copy_vector<kIn, kThreads>(shift(), args.shift, first_in, args.x.channels, InVector::place);
    copy_async_commit();
  }

  // --- producers -------------------------------------------------------------------------------

  __device__ void produce() const {
    Loaded ahead[Config::kAhead];
    int tile = block_y(), next = tile;
    DENSE_EXT_UNROLL for (int n = 0; n < Config::kAhead; n++, next += grid_y()) {
      load(ahead[n], next);
    }
    copy_async_wait<0>();
    sync_named<kThreads>(kLoaded);
    Vectors vectors;
    if (Config::kKeepsVectors) load_for_dz(vectors), load_for_x(vectors);
    int stage = 0;
    while (tile < tile_count) {
      DENSE_EXT_UNROLL for (int n = 0; n < Config::kAhead; n++) {
        if (tile >= tile_count) break;
        if (!Config::kKeepsVectors) load_for_dz(vectors);
        form_dz(ahead[n], vectors, tile);
        // The consumers have the last stage first, for W.
        if (tile >= block_y() + (kStages - 1) * grid_y()) Barriers::wait_until_empty(stage);
        store(ahead[n], vectors, stage_at(stage));
        load(ahead[n], next);
        Barriers::filled(stage);
        stage = after(stage), tile += grid_y(), next += grid_y();
      }
    }
  }

  __device__ __forceinline__ void load_for_dz(Vectors& vectors) const {
    vectors.z_scale.load(z_scale, producer());
    vectors.z_u.load(z_u(), producer());
    vectors.z_v.load(z_v(), producer());
  }
  __device__ __forceinline__ void load_for_x(Vectors& vectors) const {
    vectors.scale.load(scale(), producer());
    vectors.shift.load(shift(), producer());
  }

  __device__ __forceinline__ void load(Loaded& to, int tile) const {
    if (tile >= tile_count) return;
    if (is_partial(tile)) {
      keep_branch();
      to = {};
    }
    const auto load = [&](auto& units, const auto& from, int channel, int columns, int bytes) {
      const Rows rows(from.data + channel, from.stride, pixels);
      units.template load<kWide>(rows, tile * kPixels, columns, bytes, producer());
    };
    load(to.grad_bn, args.grad_bn, 0, out, args.grad_bn_bytes);
    load(to.z, args.z, 0, out, args.z_bytes);
    load(to.x, args.x, first_in, ins, args.x_bytes);
    load(to.grad_x, args.grad_x, first_in, ins, args.grad_x_bytes);
  }

  // Forms dz in place of grad_bn. Beyond the last pixel it is zero; z_v would remain otherwise.
  __device__ __forceinline__ void form_dz(Loaded& loaded, const Vectors& vectors, int tile) const {
    loaded.grad_bn.for_each(producer(), [&](Bytes<16>& unit, int, int i, int j) {
      Vector<T, 16> dz(unit);
      const Vector<T, 16> z(loaded.z.unit[i][j]);
      DENSE_EXT_UNROLL for (int e = 0; e < OutUnits::kElements; e++) {
        dz.value[e] = vectors.z_scale.value[j][e] * dz.value[e] +
                      (vectors.z_u.value[j][e] * z.value[e] + vectors.z_v.value[j][e]);
      }
      unit = dz.stored();
    });
    if (is_partial(tile)) {
      keep_branch();
      loaded.grad_bn.clear(pixels - tile * kPixels, producer());
    }
  }

  // Stores a tile, and the activated x for dW; the data gradient needs x itself too.
  __device__ __forceinline__ void store(Loaded& loaded, Vectors& vectors, const Stage& to) const {
    loaded.grad_bn.store(to.dz, OutLayout{}, producer());
    loaded.x.store(to.x, InLayout{}, producer());
    loaded.grad_x.store(to.grad_x, InLayout{}, producer());
    if (!args.wants_weight) return;
    if (!Config::kKeepsVectors) load_for_x(vectors);
    loaded.x.for_each(producer(), [&](Bytes<16>& unit, int, int, int j) {
      unit = activated<T>(unit, vectors.scale.value[j], vectors.shift.value[j]);
    });
    loaded.x.store(to.activated, InLayout{}, producer());
  }

  // --- consumers -------------------------------------------------------------------------------

  __device__ void consume() {
    load_weight();
    ColumnVectors vectors;
    if (Config::kKeepsVectors) load_for_columns(vectors);
    if (block_y() + (kStages - 1) * grid_y() < tile_count) {
      Barriers::emptied(kStages - 1);
    }
    int stage = 0;
    DENSE_EXT_NO_UNROLL for (int tile = block_y(); tile < tile_count; tile += grid_y()) {
      Barriers::wait_until_full(stage);
      const Stage at = stage_at(stage);
      if (args.wants_weight) add_weight_gradient(at);
      add_data_gradient(at, vectors);
      store_gradient(at, tile);
      // Except where no tile follows in this stage.
      if (tile + kStages * grid_y() < tile_count) Barriers::emptied(stage);
      stage = after(stage);
    }
    leave_column_sums<kIn>(sums, sum_g, sum_gx, data_row() / 16, data_column());
    if (args.wants_weight) write_weight_gradient();
  }

  // Loads W for the warp's columns of da, as fragments of b, through the memory of the last stage.
  __device__ __forceinline__ void load_weight() {
    T* const tile = stage_at(kStages - 1).dz;
    copy_tile<kOut, kIn, kConsumers, kWide>(
        tile, InLayout{}, ins, args.weight_bytes,
        Rows(args.weight.data + first_in, args.weight.out_stride, out));
    copy_async_commit();
    copy_async_wait<0>();
    sync_named<kThreads>(kLoaded);
    DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
      InFragments::load_transposed_columns(w[k][0], w[k][1], tile, k * Math::kDepth, data_column(),
                                           0);
    }
  }

  __device__ __forceinline__ void load_for_columns(ColumnVectors& vectors) const {
    DENSE_EXT_UNROLL for (int j = 0; j < kDataColumns; j++) {
      const int column = InVector::place(data_column() + 8 * j + Position().column);
      vectors.mean[j] = load_pair(mean() + column);
      vectors.scale[j] = load_pair(scale() + column);
      vectors.shift[j] = load_pair(shift() + column);
    }
  }

  // dW += dz^T @ the activated x.
  __device__ __forceinline__ void add_weight_gradient(const Stage& at) {
    DENSE_EXT_UNROLL for (int k = 0; k < kPixels; k += Math::kDepth) {
      uint32_t rows[kWeightRows][4], columns[kWeightColumns][2];
      DENSE_EXT_UNROLL for (int i = 0; i < kWeightRows; i++) {
        OutFragments::load_transposed_rows(rows[i], at.dz, k, weight_row(), 64 * i);
      }
      DENSE_EXT_UNROLL for (int j = 0; j < kWeightColumns; j += 2) {
        InFragments::load_transposed_columns(columns[j], columns[j + 1], at.activated, k,
                                             weight_column(), 8 * j);
      }
      multiply<Math>(dw, rows, columns);
    }
  }

  // grad_x += scale*g in shared memory, and the sums. Pixels beyond the last have zeros in dz and
  // x, and add nothing.
  __device__ __forceinline__ void add_data_gradient(const Stage& at, ColumnVectors& vectors) {
    float da[1][kDataColumns][4] = {};  // dz @ W
    DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
      uint32_t a[1][4];
      OutFragments::load_rows(a[0], at.dz, data_row(), 0, k * Math::kDepth);
      multiply<Math>(da, a, w[k]);
    }
    if (!Config::kKeepsVectors) load_for_columns(vectors);
    const Position lane;
    const InLayout layout{in_register(data_column())};
    T* const grad_x = at.grad_x + data_row() * InLayout::kLd;
    Float2 x[2][2], before[2][2];
    load_pairs(x, at.x + data_row() * InLayout::kLd, layout);
    load_pairs(before, grad_x, layout);
    sync_warp();  // all lanes have read `before` when one overwrites it
    DENSE_EXT_UNROLL for (int j = 0; j < kDataColumns; j++) {
      const Float2 s = vectors.scale[j], t = vectors.shift[j], m = vectors.mean[j];
      DENSE_EXT_UNROLL for (int half = 0; half < 2; half++) {
        const Float2 value = x[j][half];
        const float gx = value.x * s.x + t.x <= 0 ? 0.0f : da[0][j][2 * half];
        const float gy = value.y * s.y + t.y <= 0 ? 0.0f : da[0][j][2 * half + 1];
        sum_g[j][0] += gx;
        sum_g[j][1] += gy;
        sum_gx[j][0] += gx * (value.x - m.x);
        sum_gx[j][1] += gy * (value.y - m.y);
        store_pair(grad_x + offset_in(layout, lane.row + 8 * half, 8 * j + lane.column),
                   before[j][half].x + s.x * gx, before[j][half].y + s.y * gy);
      }
    }
  }

  // Stores the warp's part of grad_x.
  __device__ __forceinline__ void store_gradient(const Stage& at, int tile) const {
    sync_warp();
    const int first = tile * kPixels + data_row();
    const Rows to(args.grad_x.data + first_in + data_column(), args.grad_x.stride, pixels);
    store_tile<16, 8 * kDataColumns, kWarp, kWide>(
        at.grad_x + data_row() * InLayout::kLd, InLayout{data_column()}, ins - data_column(),
        args.grad_x_bytes, [&](int r) { return to(first + r); }, lane_index());
  }

  __device__ __forceinline__ void write_weight_gradient() const {
    float* row = args.rows + block_y() * args.row_size + 2 * args.x.channels + first_in;
    for_pairs(dw, [&](int r, int column, float left, float right) {
      const int b = weight_row() + r / 16 * 64 + r % 16, c = weight_column() + column;
      if (b < out && c < ins) store_global(row + b * args.x.channels + c, left);
      if (b < out && c + 1 < ins) store_global(row + b * args.x.channels + c + 1, right);
    });
  }

  __device__ float* z_u() const { return z_scale + OutVector::kSize; }
  __device__ float* z_v() const { return z_u() + OutVector::kSize; }
  __device__ float* mean() const { return z_v() + OutVector::kSize; }
  __device__ float* scale() const { return mean() + InVector::kSize; }
  __device__ float* shift() const { return scale() + InVector::kSize; }

  __device__ static int producer() { return thread_index() - kConsumers; }
  // A consumer warp's positions in da and dW. With kOut > 128 they are computed again at every use,
  // because there are no registers to keep them.
  __device__ static int consumer() { return kOut > 128 ? in_register(warp_index()) : warp_index(); }
  __device__ static int data_row() { return consumer() / 4 * 16; }
  __device__ static int data_column() { return consumer() % 4 * 16; }
  __device__ static int weight_row() { return consumer() / 2 * 16; }
  __device__ static int weight_column() { return consumer() % 2 * 32; }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const BackwardArguments<typename Config::T> args) {
  BackwardBlock<Config>(args, SharedMemory()).run();
}

template <class Config>
void run_backward(BackwardArguments<typename Config::T> args, const Tensor& like,
                  const Sums<typename Config::T>& sums) {
  static_assert(Config::kSharedBytes <= kSmallestSharedBytes);
  // Pixels are numbered in 32 bits, also those of tiles after the last.
  constexpr int64_t kMaxPixels = (int64_t{1} << 31) - (1 << 16);
  STD_TORCH_CHECK(args.x.count() <= kMaxPixels, "takes up to ", kMaxPixels, " pixels, got ",
                  args.x.count());
  const int64_t chunks = ceil_div(args.x.channels, Config::kIn);
  const int64_t blocks =
      persistent_blocks(ceil_div(args.x.count(), Config::kPixels), chunks, 1, Config::kSharedBytes);
  const Tensor rows = scratch(blocks * args.row_size, like);
  args.rows = static_cast<float*>(rows.data_ptr());
  launch<backward_kernel<Config>>({chunks, blocks, Config::kThreads, Config::kSharedBytes}, args);
  add_rows(rows, blocks, sums);
}

}  // namespace
}  // namespace dense_ext
