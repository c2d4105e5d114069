// The kernel of bn_relu_conv1x1.cu's backward, which has the formulas and the shapes.

#pragma once

#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

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
  int stages;  // tiles in shared memory at a time
};

// A block takes kIn channels of x and all of B, at most kOut, and goes through tiles of kPixels. It
// forms dz and activates x in shared memory. The warps divide da [kPixels, kIn] 2 x 4 and dW
// [kOut, kIn] 4 x 2, of whose rows each of the four takes every fourth 16.
template <class Math_, int kOut_, bool kWide_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  template <bool kOther>
  using OfWidth = Backward<Math, kOut_, kOther>;
  static constexpr int kThreads = 256, kOut = kOut_, kIn = 64, kPixels = 32;
  using OutLayout = TileLayout<T, kOut>;
  using InLayout = TileLayout<T, kIn>;
  // grad_bn and z; x, grad_x and the activated x.
  static constexpr int kStageSize = kPixels * (2 * OutLayout::kLd + 3 * InLayout::kLd);
  // The blocks per multiprocessor for which the registers suffice.
  static constexpr int kBlocks = sizeof(T) == 2 && kOut <= 128 ? 2 : 1;
  using OutVector = UnitVector<T, kOut>;
  using InVector = UnitVector<T, kIn>;
  static constexpr int kVectors = 3 * OutVector::kSize + 3 * InVector::kSize;

  static constexpr int shared_bytes(int stages) {
    return SharedMemory::bytes_of(stages * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(2 * 2 * kIn * int64_t{sizeof(float)});
  }
  // Whether every GPU has memory for two stages.
  static constexpr bool kTwoFit = shared_bytes(2) <= kSmallestSharedBytes;
};

// The phases of a block, and what they share.
template <class Config>
struct BackwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  using OutVector = typename Config::OutVector;
  using InVector = typename Config::InVector;
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kIn = Config::kIn;
  using OutLayout = typename Config::OutLayout;
  using InLayout = typename Config::InLayout;
  using OutFragments = TileFragments<T, kOut>;
  using InFragments = TileFragments<T, kIn>;
  static constexpr bool kWide = Config::kWide;
  // Fragments per warp.
  static constexpr int kDataColumns = 2, kWeightRows = kOut / 64, kWeightColumns = 4;

  // A tile in shared memory. dz replaces grad_bn, and the new grad_x replaces the old one.
  struct Stage {
    T *dz, *z;                  // [kPixels][kOut]
    T *x, *grad_x, *activated;  // [kPixels][kIn]
    __device__ explicit Stage(T* begin)
        : dz(begin),
          z(dz + kPixels * OutLayout::kLd),
          x(z + kPixels * OutLayout::kLd),
          grad_x(x + kPixels * InLayout::kLd),
          activated(grad_x + kPixels * InLayout::kLd) {}
  };

  const BackwardArguments<T>& args;
  T* const tiles;
  float *const z_scale, *const sums;
  const int first_in, out, ins;                      // ins: the block's channels of x
  const int tile_count, rows_of_last;                // rows: of the last tile
  uint32_t w[kOut / Math::kDepth][kDataColumns][2];  // W for the warp's columns of da
  float dw[kWeightRows][kWeightColumns][4] = {};     // the warp's part of dW
  float sum_g[kDataColumns][2] = {}, sum_gx[kDataColumns][2] = {};

  __device__ BackwardBlock(const BackwardArguments<T>& args, SharedMemory shared)
      : args(args),
        tiles(shared.take<T>(args.stages * Config::kStageSize)),
        z_scale(shared.take<float>(Config::kVectors)),
        sums(shared.take<float>(2 * 2 * kIn)),
        first_in(block_x() * kIn),
        out(static_cast<int>(args.z.channels)),
        ins(std::min(int{kIn}, static_cast<int>(args.x.channels) - first_in)),
        tile_count(static_cast<int>((args.x.count() + kPixels - 1) / kPixels)),
        rows_of_last(static_cast<int>(args.x.count() - int64_t{tile_count - 1} * kPixels)) {}

  // A tile takes one barrier in a wide kernel: a thread forms dz and activates x in the units that
  // it copied itself, and a warp stores the part of grad_x that it computed.
  __device__ void run() {
    load_vectors();
    load_weight();
    int stage = 0;
    load(block_y(), 0);
    copy_async_commit();
    for (int tile = block_y(); tile < tile_count; tile += grid_y()) {
      const Stage at(tiles + stage * Config::kStageSize);
      const int rows = rows_of(tile);
      copy_async_wait<0>();
      if (!kWide) sync_threads();
      form_dz(at, rows);
      if (args.wants_weight) activate(at);
      sync_threads();
      if (two_stages()) {
        stage = 1 - stage;
        load(tile + grid_y(), stage);
        copy_async_commit();
      }
      if (args.wants_weight) add_weight_gradient(at);
      add_data_gradient(at);
      store(at, tile, rows);
      if (!two_stages()) {
        sync_threads();
        load(tile + grid_y(), 0);
        copy_async_commit();
      }
    }
    copy_async_wait<0>();
    write_sums();
    if (args.wants_weight) write_weight_gradient();
  }

  __device__ __forceinline__ void load_vectors() const {
    copy_vector<kOut, kThreads>(z_scale, args.z_scale, 0, out, OutVector::place);
    copy_vector<kOut, kThreads>(z_u(), args.z_u, 0, out, OutVector::place);
    copy_vector<kOut, kThreads>(z_v(), args.z_v, 0, out, OutVector::place);
    copy_vector<kIn, kThreads>(mean(), args.mean, first_in, args.x.channels, InVector::place);
    copy_vector<kIn, kThreads>(scale(), args.scale, first_in, args.x.channels, InVector::place);
    copy_vector<kIn, kThreads>(shift(), args.shift, first_in, args.x.channels, InVector::place);
  }

  // Loads W for the warp's columns of da, as fragments of b, through the memory of the tiles.
  __device__ __forceinline__ void load_weight() {
    static_assert(kOut * InLayout::kLd <= Config::kStageSize);
    copy_tile<kOut, kIn, kThreads, kWide>(
        tiles, InLayout{}, ins, args.weight_bytes,
        Rows(args.weight.data + first_in, args.weight.out_stride, out));
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
      InFragments::load_transposed_columns(w[k][0], w[k][1], tiles, k * Math::kDepth, data_column(),
                                           0);
    }
    sync_threads();
  }

  __device__ __forceinline__ void load(int tile, int stage) const {
    if (tile >= tile_count) return;
    const Stage to(tiles + stage * Config::kStageSize);
    copy<kOut>(to.dz, args.grad_bn, 0, tile, out, args.grad_bn_bytes);
    copy<kOut>(to.z, args.z, 0, tile, out, args.z_bytes);
    copy<kIn>(to.x, args.x, first_in, tile, ins, args.x_bytes);
    copy<kIn>(to.grad_x, args.grad_x, first_in, tile, ins, args.grad_x_bytes);
  }
  template <int kColumns, class U>
  __device__ __forceinline__ void copy(T* to, const Pixels<U>& from, int channel, int tile,
                                       int columns, int bytes) const {
    copy_tile<kPixels, kColumns, kThreads, kWide>(
        to, TileLayout<T, kColumns>{}, columns, bytes,
        Tiles<kPixels, U>(from, channel)(tile, rows_of(tile)), this_thread());
  }

  // Forms dz in place of grad_bn. Beyond the last pixel grad_bn is zero and stays so; z_v would
  // remain otherwise.
  __device__ __forceinline__ void form_dz(const Stage& at, int rows) const {
    const Units<T, kOut, kThreads> units(this_thread());
    units.for_columns([&](int c, int) {
      float s[OutVector::kElements], u[OutVector::kElements], v[OutVector::kElements];
      OutVector::load(s, z_scale, c);
      OutVector::load(u, z_u(), c);
      OutVector::load(v, z_v(), c);
      units.template for_rows<kPixels>([&](int r, int) {
        const int place = offset_in(OutLayout{}, r, c);
        auto* const to = unit_at(at.dz + place);
        Vector<T, 16> dz(load_shared(to));
        const Vector<T, 16> z(load_shared(unit_at(at.z + place)));
        DENSE_EXT_UNROLL for (int e = 0; e < OutVector::kElements; e++) {
          dz.value[e] = s[e] * dz.value[e] + (u[e] * z.value[e] + v[e]);
        }
        if (r < rows) store_shared(to, dz.stored());
      });
    });
  }

  // Activates x for dW; the data gradient needs x itself too.
  __device__ __forceinline__ void activate(const Stage& at) const {
    const Units<T, kIn, kThreads> units(this_thread());
    units.for_columns([&](int c, int) {
      float s[InVector::kElements], t[InVector::kElements];
      InVector::load(s, scale(), c);
      InVector::load(t, shift(), c);
      units.template for_rows<kPixels>([&](int r, int) {
        const int place = offset_in(InLayout{}, r, c);
        const auto x = load_shared(unit_at(at.x + place));
        store_shared(unit_at(at.activated + place), activated<T>(x, s, t));
      });
    });
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
  __device__ __forceinline__ void add_data_gradient(const Stage& at) {
    float da[1][kDataColumns][4] = {};  // dz @ W
    DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
      uint32_t a[1][4];
      OutFragments::load_rows(a[0], at.dz, data_row(), 0, k * Math::kDepth);
      multiply<Math>(da, a, w[k]);
    }
    const Position lane;
    const InLayout layout{in_register(data_column())};
    T* const grad_x = at.grad_x + data_row() * InLayout::kLd;
    Float2 x[2][2], before[2][2];
    load_pairs(x, at.x + data_row() * InLayout::kLd, layout);
    load_pairs(before, grad_x, layout);
    sync_warp();  // all lanes have read `before` when one overwrites it
    DENSE_EXT_UNROLL for (int j = 0; j < kDataColumns; j++) {
      const int column = InVector::place(data_column() + 8 * j + lane.column);
      const Float2 s = load_pair(scale() + column), t = load_pair(shift() + column);
      const Float2 m = load_pair(mean() + column);
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
  __device__ __forceinline__ void store(const Stage& at, int tile, int rows) const {
    sync_warp();
    store_tile<16, 8 * kDataColumns, kWarp, kWide>(
        at.grad_x + data_row() * InLayout::kLd, InLayout{data_column()}, ins - data_column(),
        args.grad_x_bytes,
        // Tiles would take three registers more than there are on 8.0, 8.6 and 8.9.
        Rows(args.grad_x, int64_t{tile} * kPixels + data_row(), rows - data_row(),
             first_in + data_column()),
        this_thread() % kWarp);
  }

  __device__ __forceinline__ void write_sums() {
    float* row = args.rows + block_y() * args.row_size + first_in;
    leave_column_sums<kIn>(sums, sum_g, sum_gx, data_row() / 16, data_column());
    sync_threads();
    add_column_sums<kThreads, 2, kIn>(sums, ins, row, row + args.x.channels);
  }
  __device__ __forceinline__ void write_weight_gradient() const {
    float* row = args.rows + block_y() * args.row_size + 2 * args.x.channels + first_in;
    for_pairs(dw, [&](int r, int column, float left, float right) {
      const int b = weight_row() + r / 16 * 64 + r % 16, c = weight_column() + column;
      if (b < out && c < ins) store_global(row + b * args.x.channels + c, left);
      if (b < out && c + 1 < ins) store_global(row + b * args.x.channels + c + 1, right);
    });
  }

  __device__ int rows_of(int tile) const { return tile + 1 < tile_count ? kPixels : rows_of_last; }
  // The thread's index; what follows from it is computed again at every use, because there are no
  // registers to keep it.
  __device__ __forceinline__ static int this_thread() {
    const int thread = in_register(thread_index());
    DENSE_EXT_ASSUME(thread >= 0);  // without it, dividing takes four instructions more
    return thread;
  }
  __device__ bool two_stages() const { return Config::kTwoFit || args.stages > 1; }

  // The warp's positions in da and dW.
  __device__ static int data_row() { return warp_index() / 4 * 16; }
  __device__ static int data_column() { return warp_index() % 4 * 16; }
  __device__ static int weight_row() { return warp_index() / 2 * 16; }
  __device__ static int weight_column() { return warp_index() % 2 * 32; }

  __device__ float* z_u() const { return z_scale + OutVector::kSize; }
  __device__ float* z_v() const { return z_u() + OutVector::kSize; }
  __device__ float* mean() const { return z_v() + OutVector::kSize; }
  __device__ float* scale() const { return mean() + InVector::kSize; }
  __device__ float* shift() const { return scale() + InVector::kSize; }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    backward_kernel(const BackwardArguments<typename Config::T> args) {
  BackwardBlock<Config>(args, SharedMemory()).run();
}

template <class Config>
void run_backward(BackwardArguments<typename Config::T> args, const Tensor& like,
                  const Sums<typename Config::T>& sums) {
  static_assert(Config::shared_bytes(1) <= kSmallestSharedBytes);
  const int64_t chunks = ceil_div(args.x.channels, Config::kIn);
  args.stages = Config::shared_bytes(2) <= current_device().shared_bytes ? 2 : 1;
  const int shared = Config::shared_bytes(args.stages);
  const int64_t blocks =
      persistent_blocks(ceil_div(args.x.count(), Config::kPixels), chunks, Config::kBlocks, shared);
  const Tensor rows = scratch(blocks * args.row_size, like);
  args.rows = static_cast<float*>(rows.data_ptr());
  launch<backward_kernel<Config>>({chunks, blocks, Config::kThreads, shared}, args);
  add_rows(rows, blocks, sums);
}

}  // namespace
}  // namespace dense_ext
