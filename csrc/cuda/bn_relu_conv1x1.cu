// Forward:  z = relu(scale*x + shift) @ W^T, and z's mean and variance.
// Backward: dz = z_scale*grad_bn + z_u*z + z_v;  g = (dz @ W) where scale*x + shift > 0, else 0
//           grad_x += scale*g;  sums = [sum g, sum g*(x - mean)]
//           dW = dz^T @ relu(scale*x + shift)
//
// x, grad_x [M, C]; z, grad_bn [M, B]; each with its own pixel stride. W, dW [B, C].
//
// Elements moved per pixel: C + B forward, 3 C + 2 B backward, each from device memory once. Blocks
// that run at the same time share inputs through the L2 cache. Forward they share x if B exceeds
// 128; backward they share grad_bn and z, since each takes a chunk of C. Backward is one kernel: dW
// and W of the chunk stay in registers for all of a block's pixels. In addition, each block writes
// a row of moments, or of sums and dW.

#include <torch/csrc/stable/library.h>

#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 256;

// --- forward ---------------------------------------------------------------------------------

template <class T>
struct ForwardArguments {
  Pixels<const T> x;
  const float *scale, *shift;  // [C]
  Weight<const T> weight;      // [B, C]
  Pixels<T> z;
  float* moments;  // [blocks, 1 + 2 B]; null if not wanted
  int x_bytes, weight_bytes, z_bytes;
};

// A block computes tiles of z of kPixels x kOut with eight warps, 4 x 2, and steps through C in a
// pipeline of kStages stages. Two blocks share a multiprocessor, so that one loads or stores while
// the other computes.
template <class Math_, int kOut_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kOut = kOut_, kPixels = 128, kStages = 3;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kStageSize = (kPixels + kOut) * kLd;
  static constexpr int kWarpRows = 2, kWarpColumns = kOut / 16;  // fragments per warp
  using Statistics = ColumnMoments<T, kOut, kThreads>;

  static constexpr int kTileSize =
      kStages * kStageSize > kPixels* kOutLd ? kStages * kStageSize : kPixels * kOutLd;
  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kTileSize * int64_t{sizeof(T)}) +
      SharedMemory::bytes_of(kStages * 2 * kDepth * int64_t{sizeof(float)}) +
      SharedMemory::bytes_of(Statistics::kScratch * int64_t{sizeof(float)});
};

template <class Config>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const ForwardArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kPixels = Config::kPixels, kOut = Config::kOut, kDepth = Config::kDepth;
  constexpr int kLd = Config::kLd, kStages = Config::kStages;
  SharedMemory shared;
  T* const tiles = shared.take<T>(Config::kTileSize);
  float* const vectors = shared.take<float>(kStages * 2 * kDepth);
  typename Config::Statistics statistics(shared.take<float>(Config::Statistics::kScratch));

  const int64_t pixels = args.x.count(), first_out = int64_t{block_x()} * kOut;
  const int in = static_cast<int>(args.x.channels);
  const int outs = static_cast<int>(std::min(int64_t{kOut}, args.z.channels - first_out));
  const int steps = (in + kDepth - 1) / kDepth;
  const int warp_row = warp_index() / 2 * 32, warp_column = warp_index() % 2 * (kOut / 2);
  const RowFragment<T> rows([&](int r) { return (warp_row + r) * kLd; });
  const ColumnFragments<T> columns(kLd);

  const int tile_count = static_cast<int>((pixels + kPixels - 1) / kPixels);
  for (int tile = block_y(); tile < tile_count; tile += grid_y()) {
    const int64_t first = int64_t{tile} * kPixels;
    const int tile_rows = static_cast<int>(std::min(int64_t{kPixels}, pixels - first));

    const auto load = [&](int step) {
      T* x = tiles + step % kStages * Config::kStageSize;
      const int c = step * kDepth;
      copy_tile<kPixels, kDepth, kThreads>(x, kLd, in - c, args.x_bytes,
                                           Rows(args.x, first, tile_rows, c));
      copy_tile<kOut, kDepth, kThreads>(
          x + kPixels * kLd, kLd, in - c, args.weight_bytes, [&](int r) {
            return r < outs ? args.weight.data + (first_out + r) * args.weight.out_stride + c
                            : nullptr;
          });
      float* vector = vectors + step % kStages * 2 * kDepth;
      copy_vector<kDepth, kThreads>(vector, args.scale, c, in);
      copy_vector<kDepth, kThreads>(vector + kDepth, args.shift, c, in);
    };

    float z[Config::kWarpRows][Config::kWarpColumns][4] = {};
    const auto compute = [&](int step) {
      const T* x = tiles + step % kStages * Config::kStageSize;
      const T* weight = x + kPixels * kLd + warp_column * kLd;
      const float* vector = vectors + step % kStages * 2 * kDepth;
      DENSE_EXT_NO_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) {
        const DepthFactors<T> factors(vector + k, vector + kDepth + k);
        uint32_t a[Config::kWarpRows][4];
        DENSE_EXT_UNROLL for (int i = 0; i < Config::kWarpRows; i++) {
          rows.load(a[i], x + 16 * i * kLd + k);
          factors.activate(a[i]);
        }
        DENSE_EXT_UNROLL for (int j = 0; j < Config::kWarpColumns; j += 2) {
          uint32_t b[2][2];
          columns.load(b[0], b[1], weight + 8 * j * kLd + k, kLd);
          multiply<Math>(z, a, b, j);
        }
      }
    };
    pipeline<kStages>(steps, load, compute);

    // The pipeline's memory now holds the tile of z.
    for_pairs(z, [&](int row, int column, float left, float right) {
      store_pair(tiles + (warp_row + row) * Config::kOutLd + warp_column + column, left, right);
    });
    sync_threads();
    store_tile<kPixels, kOut, kThreads>(tiles, Config::kOutLd, outs, args.z_bytes,
                                        Rows(args.z, first, tile_rows, first_out));
    if (args.moments) {
      statistics.template add<kPixels>(tiles, Config::kOutLd, [&](int r) { return r < tile_rows; });
    }
    sync_threads();
  }
  if (args.moments) {
    const int64_t out = args.z.channels;
    statistics.write(args.moments + block_y() * (1 + 2 * out), first_out, out, outs);
  }
}

template <class Config>
void run_forward(ForwardArguments<typename Config::T> args, const Tensor& like, float* mean,
                 float* var) {
  static_assert(Config::kSharedBytes <= kSmallestSharedBytes);
  const int64_t out = args.z.channels, columns = ceil_div(out, Config::kOut);
  const int64_t blocks = persistent_blocks(ceil_div(args.x.count(), Config::kPixels), columns, 2,
                                           Config::kSharedBytes);
  with_moments(blocks, out, like, mean, var, [&](float* moments) {
    args.moments = moments;
    launch<forward_kernel<Config>>({columns, blocks, kThreads, Config::kSharedBytes}, args);
  });
}

void bn_relu_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& z,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                             bool tf32) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    const auto zs = pixels<T>(z, "z", xs, out);
    float* means = channels<float>(mean, "mean", out);
    float* vars = channels<float>(var, "var", out);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    if (xs.count() == 0) {
      if (mean) zero(*mean);
      if (var) zero(*var);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    const ForwardArguments<T> args{
        .x = xs,
        .scale = scales,
        .shift = shifts,
        .weight = weights,
        .z = zs,
        .moments = nullptr,
        .x_bytes = AccessBytes().add(xs),
        .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
        .z_bytes = AccessBytes().add(zs)};
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if (out <= 64) {
        run_forward<Forward<Math, 64>>(args, x, means, vars);
      } else {
        run_forward<Forward<Math, 128>>(args, x, means, vars);
      }
    });
  });
}

// --- backward --------------------------------------------------------------------------------

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
  int grad_bn_bytes, z_bytes, x_bytes, weight_bytes, grad_x_bytes;
  int stages;  // tiles in shared memory at a time
};

// A block takes kIn channels of x and all of B, at most kOut, and goes through tiles of kPixels. It
// forms dz in shared memory. The warps divide da [kPixels, kIn] 2 x 4 and dW [kOut, kIn] 4 x 2.
template <class Math_, int kOut_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kOut = kOut_, kIn = 64, kPixels = 32;
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kStageSize = 2 * kPixels * (kOutLd + kInLd);
  // The blocks per multiprocessor for which the registers suffice.
  static constexpr int kBlocks = sizeof(T) == 2 && kOut <= 128 ? 2 : 1;
  static constexpr int kVectors = 3 * kOut + 3 * kIn;

  static constexpr int shared_bytes(int stages) {
    return SharedMemory::bytes_of(stages * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(2 * 2 * kIn * int64_t{sizeof(float)});
  }
};

template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kBlocks)
    backward_kernel(const BackwardArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kPixels = Config::kPixels, kOut = Config::kOut, kIn = Config::kIn;
  constexpr int kOutLd = Config::kOutLd, kInLd = Config::kInLd;
  SharedMemory shared;
  T* const tiles = shared.take<T>(args.stages * Config::kStageSize);
  float* const z_scale = shared.take<float>(Config::kVectors);
  float *const z_u = z_scale + kOut, *const z_v = z_u + kOut;
  float *const mean = z_v + kOut, *const scale = mean + kIn, *const shift = scale + kIn;
  float* const sums = shared.take<float>(2 * 2 * kIn);

  const int64_t pixels = args.x.count(), first_in = int64_t{block_x()} * kIn;
  const int out = static_cast<int>(args.z.channels);
  const int ins = static_cast<int>(std::min(int64_t{kIn}, args.x.channels - first_in));
  copy_vector<kOut, kThreads>(z_scale, args.z_scale, 0, out);
  copy_vector<kOut, kThreads>(z_u, args.z_u, 0, out);
  copy_vector<kOut, kThreads>(z_v, args.z_v, 0, out);
  copy_vector<kIn, kThreads>(mean, args.mean, first_in, args.x.channels);
  copy_vector<kIn, kThreads>(scale, args.scale, first_in, args.x.channels);
  copy_vector<kIn, kThreads>(shift, args.shift, first_in, args.x.channels);

  // The warp's positions in da and dW.
  constexpr int kDataColumns = 2, kWeightRows = kOut / 64, kWeightColumns = 4;  // fragments
  const int warp = warp_index(), lane = lane_index();
  const int data_row = warp / 4 * 16, data_column = warp % 4 * 16;
  const int weight_row = warp / 2 * (kOut / 4), weight_column = warp % 2 * 32;
  const RowFragment<T> dz_rows([&](int r) { return (data_row + r) * kOutLd; });
  const TransposedRowFragment<T> dz_columns([&](int k) { return k * kOutLd + weight_row; });
  const TransposedColumnFragments<T> columns(kInLd);
  const Position at;

  // Loads W for the warp's columns of da, as fragments of b, through the memory of the tiles.
  static_assert(kOut * kInLd <= Config::kStageSize);
  copy_tile<kOut, kIn, kThreads>(tiles, kInLd, ins, args.weight_bytes, [&](int r) {
    return r < out ? args.weight.data + r * args.weight.out_stride + first_in : nullptr;
  });
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  uint32_t w[kOut / Math::kDepth][kDataColumns][2];
  DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
    columns.load(w[k][0], w[k][1], tiles + k * Math::kDepth * kInLd + data_column, kInLd);
  }
  sync_threads();

  float dw[kWeightRows][kWeightColumns][4] = {};
  float sum_g[kDataColumns][2] = {}, sum_gx[kDataColumns][2] = {};

  const int tile_count = static_cast<int>((pixels + kPixels - 1) / kPixels);
  const auto load = [&](int tile, int stage) {
    if (tile >= tile_count) return;
    T* grad_bn = tiles + stage * Config::kStageSize;
    T *z = grad_bn + kPixels * kOutLd, *x = z + kPixels * kOutLd, *grad_x = x + kPixels * kInLd;
    const int64_t first = int64_t{tile} * kPixels;
    const int rows = static_cast<int>(std::min(int64_t{kPixels}, pixels - first));
    copy_tile<kPixels, kOut, kThreads>(grad_bn, kOutLd, out, args.grad_bn_bytes,
                                       Rows(args.grad_bn, first, rows, 0));
    copy_tile<kPixels, kOut, kThreads>(z, kOutLd, out, args.z_bytes, Rows(args.z, first, rows, 0));
    copy_tile<kPixels, kIn, kThreads>(x, kInLd, ins, args.x_bytes,
                                      Rows(args.x, first, rows, first_in));
    copy_tile<kPixels, kIn, kThreads>(grad_x, kInLd, ins, args.grad_x_bytes,
                                      Rows(args.grad_x, first, rows, first_in));
  };

  int stage = 0;
  load(block_y(), 0);
  copy_async_commit();
  for (int tile = block_y(); tile < tile_count; tile += grid_y()) {
    copy_async_wait<0>();
    sync_threads();
    if (args.stages > 1) load(tile + grid_y(), 1 - stage);
    copy_async_commit();
    T* const dz = tiles + stage * Config::kStageSize;
    const T* const z = dz + kPixels * kOutLd;
    const T* const x = z + kPixels * kOutLd;
    T* const grad_x = dz + kPixels * (2 * kOutLd + kInLd);
    const int rows = static_cast<int>(std::min(int64_t{kPixels}, pixels - int64_t{tile} * kPixels));

    // Forms dz in place of grad_bn. Beyond the last pixel it must be zero, but z_v would remain.
    for (int i = thread_index(); i < kPixels * kOut / 2; i += kThreads) {
      const int r = i / (kOut / 2), b = i % (kOut / 2) * 2;
      T* to = dz + r * kOutLd + b;
      const Float2 g = load_pair(to), value = load_pair(z + r * kOutLd + b);
      const Float2 s = load_pair(z_scale + b), u = load_pair(z_u + b), v = load_pair(z_v + b);
      const bool valid = r < rows;
      store_pair(to, valid ? s.x * g.x + (u.x * value.x + v.x) : 0.0f,
                 valid ? s.y * g.y + (u.y * value.y + v.y) : 0.0f);
    }
    sync_threads();

    if (args.wants_weight) {
      DENSE_EXT_NO_UNROLL for (int k = 0; k < kPixels; k += Math::kDepth) {
        uint32_t a[kWeightRows][4];
        DENSE_EXT_UNROLL for (int i = 0; i < kWeightRows; i++) {
          dz_columns.load(a[i], dz + k * kOutLd + 16 * i);
        }
        DENSE_EXT_UNROLL for (int j = 0; j < kWeightColumns; j += 2) {
          uint32_t b[2][2];
          const int column = weight_column + 8 * j;
          columns.load(b[0], b[1], x + k * kInLd + column, kInLd);
          DENSE_EXT_UNROLL for (int i = 0; i < 2; i++) {
            const int c = column + 8 * i + lane / 4;
            activate_column<T>(b[i], load_shared(scale + c), load_shared(shift + c));
          }
          multiply<Math>(dw, a, b, j);
        }
      }
    }

    float da[1][kDataColumns][4] = {};
    DENSE_EXT_UNROLL for (int k = 0; k < kOut / Math::kDepth; k++) {
      uint32_t a[1][4];
      dz_rows.load(a[0], dz + k * Math::kDepth);
      multiply<Math>(da, a, w[k]);
    }
    DENSE_EXT_UNROLL for (int j = 0; j < kDataColumns; j++) {
      const int column = data_column + 8 * j + at.column;
      const Float2 s = load_pair(scale + column), t = load_pair(shift + column);
      const Float2 m = load_pair(mean + column);
      DENSE_EXT_UNROLL for (int half = 0; half < 2; half++) {
        const int row = data_row + at.row + 8 * half;
        const Float2 value = load_pair(x + row * kInLd + column);
        T* to = grad_x + row * kInLd + column;
        const Float2 before = load_pair(to);
        const float gx = row >= rows || value.x * s.x + t.x <= 0 ? 0.0f : da[0][j][2 * half];
        const float gy = row >= rows || value.y * s.y + t.y <= 0 ? 0.0f : da[0][j][2 * half + 1];
        sum_g[j][0] += gx;
        sum_g[j][1] += gy;
        sum_gx[j][0] += row < rows ? gx * (value.x - m.x) : 0.0f;
        sum_gx[j][1] += row < rows ? gy * (value.y - m.y) : 0.0f;
        store_pair(to, before.x + s.x * gx, before.y + s.y * gy);
      }
    }
    sync_threads();
    store_tile<kPixels, kIn, kThreads>(grad_x, kInLd, ins, args.grad_x_bytes,
                                       Rows(args.grad_x, int64_t{tile} * kPixels, rows, first_in));
    if (args.stages > 1) {
      stage = 1 - stage;
    } else {
      sync_threads();
      load(tile + grid_y(), 0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();

  float* row = args.rows + block_y() * args.row_size;
  write_column_sums<kThreads, 2, kIn>(sums, sum_g, sum_gx, warp / 4, data_column, ins,
                                      row + first_in, row + args.x.channels + first_in);
  if (!args.wants_weight) return;
  row += 2 * args.x.channels + first_in;
  DENSE_EXT_UNROLL for (int i = 0; i < kWeightRows; i++) {
    DENSE_EXT_UNROLL for (int j = 0; j < kWeightColumns; j++) {
      DENSE_EXT_UNROLL for (int e = 0; e < 4; e++) {
        const int b = weight_row + 16 * i + at.row + e / 2 * 8;
        const int c = weight_column + 8 * j + at.column + e % 2;
        if (b < out && c < ins) store_global(row + b * args.x.channels + c, dw[i][j][e]);
      }
    }
  }
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
  launch<backward_kernel<Config>>({chunks, blocks, kThreads, shared}, args);
  add_rows(rows, blocks, sums);
}

void bn_relu_conv1x1_backward(const Tensor& grad_bn, const Tensor& z, const Tensor& z_scale,
                              const Tensor& z_u, const Tensor& z_v, const Tensor& x,
                              const Tensor& mean, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& grad_x, const Tensor& sums,
                              const std::optional<Tensor>& grad_weight, bool tf32) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const int64_t in = xs.channels, out = weight.size(0);
    Weight<const T> weights = weight_of<const T>(weight, "weight", out, in, 1);
    const BackwardArguments<T> args{.grad_bn = pixels<const T>(grad_bn, "grad_bn", xs, out),
                                    .z = pixels<const T>(z, "z", xs, out),
                                    .z_scale = channels<const float>(z_scale, "z_scale", out),
                                    .z_u = channels<const float>(z_u, "z_u", out),
                                    .z_v = channels<const float>(z_v, "z_v", out),
                                    .x = xs,
                                    .mean = channels<const float>(mean, "mean", in),
                                    .scale = channels<const float>(scale, "scale", in),
                                    .shift = channels<const float>(shift, "shift", in),
                                    .grad_x = pixels<T>(grad_x, "grad_x", xs, in),
                                    .rows = nullptr,
                                    .row_size = 0,
                                    .wants_weight = grad_weight.has_value()};
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 1);
    if (xs.count() == 0) {
      zero(sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    // If B does not fit, pieces of it run one after another and add to grad_x and the sums.
    const auto run_pieces = [&](auto config) {
      using Config = decltype(config);
      for (int64_t b = 0; b < out; b += Config::kOut) {
        const int64_t count = std::min<int64_t>(Config::kOut, out - b);
        BackwardArguments<T> piece = args;
        piece.grad_bn = slice(args.grad_bn, b, count);
        piece.z = slice(args.z, b, count);
        piece.z_scale += b, piece.z_u += b, piece.z_v += b;
        piece.weight = weights;
        piece.weight.data += b * weights.out_stride;
        piece.row_size = 2 * in + (grad_weight ? count * in : 0);
        piece.grad_bn_bytes = AccessBytes().add(piece.grad_bn);
        piece.z_bytes = AccessBytes().add(piece.z);
        piece.x_bytes = AccessBytes().add(piece.x);
        piece.weight_bytes = AccessBytes().add(piece.weight.data, in, weights.out_stride);
        piece.grad_x_bytes = AccessBytes().add(piece.grad_x);
        Sums<T> to{.vector = sum, .vector_size = 2 * in, .accumulate = b > 0};
        if (grad_weight) to.set_weight(dw, b, count, 1);
        run_backward<Config>(piece, x, to);
      }
    };
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if constexpr (sizeof(T) == 2) {  // for float, dW and W would not fit in registers
        if (ceil_div(out, 192) < ceil_div(out, 128)) return run_pieces(Backward<Math, 192>{});
      }
      run_pieces(Backward<Math, 128>{});
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_conv1x1_forward", TORCH_BOX(&bn_relu_conv1x1_forward));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace dense_ext
