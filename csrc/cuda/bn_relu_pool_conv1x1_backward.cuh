// The kernels of bn_relu_pool_conv1x1.cu's backward, which has the formulas and the shapes.

#pragma once

#include "batch_norm.cuh"
#include "pool_window.cuh"
#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

// --- grad_x, the sums and p --------------------------------------------------------------------

template <class T>
struct DataArguments {
  Pixels<const T> grad, x;
  const float *mean, *scale, *shift;  // [C]
  const float *u, *v;                 // [C]
  Weight<const T> weight;             // [K, C]
  Pixels<T> grad_x;                   // data is null if not wanted
  Pixels<T> pooled;                   // p; data is null if not wanted
  float* rows;                        // [blocks, 2 C]: sums
  int grad_bytes, x_bytes, weight_bytes, grad_x_bytes;
};

// A block takes kIn channels of x and goes through tiles of kWindows windows. A tile's da is a
// product over K, in a pipeline of kStages stages, by eight warps 2 x 4. It is then stored in
// shared memory as floats, and each thread applies it to units of x. A thread has the same channels
// in every tile, so it keeps their sums in registers; with kAffine it adds u*x + v to grad_x
// instead.
template <class Math_, bool kAffine_>
struct Data {
  static constexpr bool kAffine = kAffine_;
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kWindows = 64, kIn = 128, kStages = 3;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kInLd = padded<T>(kIn);
  static constexpr int kGradSize = kWindows * kLd, kStageSize = kGradSize + kDepth * kInLd;
  static constexpr int kUnits = kIn / kUnit<T>, kGroups = kThreads / kUnits;

  // The layout of rows of kIn floats in shared memory. For 16-bit types, the two halves of each
  // unit are in two planes. So neighbouring threads read neighbouring floats, and fragments use
  // different banks.
  static constexpr int kFloatLd = kIn + 8, kPlane = kIn / 2 + 4;
  __device__ static int place(int channel) {
    return channel / kUnit<T> * 4 + channel % kUnit<T> / 4 * kPlane + channel % 4;
  }

  static constexpr int kTileBytes = kStages * kStageSize * static_cast<int>(sizeof(T));
  static_assert(kTileBytes >= kWindows * kFloatLd * static_cast<int>(sizeof(float)));
  static_assert(kWindows >= 2 * kGroups && kThreads == 2 * kIn);

  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kTileBytes) +
      SharedMemory::bytes_of(4 * kFloatLd * int64_t{sizeof(float)}) +
      SharedMemory::bytes_of(kWindows * int64_t{sizeof(int64_t)});
};

template <class Config>
__global__ void __launch_bounds__(kThreads, 2)
    data_kernel(const DataArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kWindows = Config::kWindows, kIn = Config::kIn, kDepth = Config::kDepth;
  constexpr int kLd = Config::kLd, kInLd = Config::kInLd, kStages = Config::kStages;
  constexpr int kFloatLd = Config::kFloatLd, kPlane = Config::kPlane, kGroups = Config::kGroups;
  SharedMemory shared;
  T* const tiles = shared.take<T>(kStages * Config::kStageSize);
  float* const floats = reinterpret_cast<float*>(tiles);  // da, then the sums
  float* const scale = shared.take<float>(4 * kFloatLd);
  float *const shift = scale + kFloatLd, *const mean = shift + kFloatLd;
  float *const u = mean, *const v = u + kFloatLd;  // in place of mean
  int64_t* const corners = shared.take<int64_t>(kWindows);

  const int first_in = block_x() * kIn;
  const int ins = std::min(kIn, static_cast<int>(args.x.channels) - first_in);
  const int out = static_cast<int>(args.grad.channels), steps = (out + kDepth - 1) / kDepth;
  for (int c = thread_index(); c < kIn; c += kThreads) {
    const auto value = [&](const float* vector) {
      return c < ins ? load_global(vector + first_in + c) : 0.0f;
    };
    store_shared(scale + Config::place(c), value(args.scale));
    store_shared(shift + Config::place(c), value(args.shift));
    if constexpr (Config::kAffine) {
      store_shared(u + Config::place(c), value(args.u));
      store_shared(v + Config::place(c), value(args.v));
    } else {
      store_shared(mean + Config::place(c), value(args.mean));
    }
  }

  const int warp_row = warp_index() / 4 * 32, warp_column = warp_index() % 4 * 32;
  const RowFragment<T> grad_rows([&](int r) { return (warp_row + r) * kLd; });
  const TransposedColumnFragments<T> weight_columns(kInLd);

  // The thread's unit, and its group: it takes every kGroups-th row of a tile, from row `group` on.
  const int unit = thread_index() % Config::kUnits * kUnit<T>;
  const int place = Config::place(unit), columns = ins - unit;
  const int group = thread_index() / Config::kUnits;
  float sum_g[kUnit<T> / 4][4] = {}, sum_gx[kUnit<T> / 4][4] = {};

  const int64_t windows = args.grad.count(), tile_count = (windows + kWindows - 1) / kWindows;
  for (int64_t tile = block_y(); tile < tile_count; tile += grid_y()) {
    const int64_t first = tile * kWindows;
    const int rows = static_cast<int>(std::min(int64_t{kWindows}, windows - first));
    sync_threads();  // the previous tile is complete
    for (int r = thread_index(); r < rows; r += kThreads) {
      store_shared(corners + r, corner_of(args.x, first + r));
    }
    float da[2][4][4] = {};
    pipeline<kStages>(
        steps,
        [&](int step, int stage) {
          T* const grad = tiles + stage * Config::kStageSize;
          const int k = step * kDepth;
          copy_tile<kWindows, kDepth, kThreads, false>(grad, kLd, out - k, args.grad_bytes,
                                                       Rows(args.grad, first, rows, k));
          copy_tile<kDepth, kIn, kThreads, false>(
              grad + Config::kGradSize, kInLd, ins, args.weight_bytes,
              Rows(args.weight.data + k * args.weight.out_stride + first_in, args.weight.out_stride,
                   out - k));
        },
        [&](int, int stage) {
          const T* const grad = tiles + stage * Config::kStageSize;
          multiply_tiles<Math, kDepth, kLd, kInLd>(da, grad_rows, grad, weight_columns,
                                                   grad + Config::kGradSize + warp_column);
        });

    Window<T> x[2];  // one is loaded while the other is processed
    const auto load = [&](int i) {
      const int r = i * kGroups + group;
      if (r >= rows) return;
      x[i % 2].load(args.x, args.x.at(load_shared(corners + r)) + first_in + unit, columns,
                    args.x_bytes);
    };
    load(0);
    for_pairs(da, [&](int r, int c, float left, float right) {
      store_pair(floats + (warp_row + r) * kFloatLd + Config::place(warp_column + c), 0.25f * left,
                 0.25f * right);
    });
    sync_threads();
    DENSE_EXT_UNROLL for (int i = 0; i < kWindows / kGroups; i++) {
      const int r = i * kGroups + group;
      load(i + 1);
      if (r >= rows || columns <= 0) continue;
      Window<T>& window = x[i % 2];
      if (args.pooled.data) {
        store_global(reinterpret_cast<Bytes<16>*>(args.pooled.at(first + r) + first_in + unit),
                     window.template pooled<kPlane>(scale + place, shift + place));
      }
      DENSE_EXT_UNROLL for (int q = 0; q < kUnit<T> / 4; q++) {
        float s[4], t[4], d[4], m[4], us[4], vs[4];
        load_four(s, scale + place + q * kPlane);
        load_four(t, shift + place + q * kPlane);
        load_four(d, floats + r * kFloatLd + place + q * kPlane);
        if constexpr (Config::kAffine) {
          load_four(us, u + place + q * kPlane);
          load_four(vs, v + place + q * kPlane);
        } else {
          load_four(m, mean + place + q * kPlane);
        }
        DENSE_EXT_UNROLL for (auto& pixel : window.pixels) {
          float value[4];
          widen<T>(value, pixel, q);
          DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) {
            const float g = value[i] * s[i] + t[i] <= 0 ? 0.0f : d[i];
            if constexpr (Config::kAffine) {
              value[i] = s[i] * g + (us[i] * value[i] + vs[i]);
            } else {
              sum_g[q][i] += g;
              sum_gx[q][i] += g * (value[i] - m[i]);
              value[i] = s[i] * g;
            }
          }
          narrow<T>(pixel, q, value);
        }
      }
      if (!args.grad_x.data) continue;
      window.store(args.grad_x, args.grad_x.at(load_shared(corners + r)) + first_in + unit, columns,
                   args.grad_x_bytes);
    }
  }
  if constexpr (Config::kAffine) return;

  // Adds the sums of the threads with the same unit.
  sync_threads();
  DENSE_EXT_UNROLL for (int q = 0; q < kUnit<T> / 4; q++) {
    float* const to = floats + group * kFloatLd + place + q * kPlane;
    store_four(to, sum_g[q]);
    store_four(to + kGroups * kFloatLd, sum_gx[q]);
  }
  sync_threads();
  const int sum = thread_index() / kIn, c = thread_index() % kIn;
  if (c >= ins) return;
  float total = 0;
  for (int g = 0; g < kGroups; g++) {
    total += load_shared(floats + (sum * kGroups + g) * kFloatLd + Config::place(c));
  }
  store_global(args.rows + (2 * int64_t{block_y()} + sum) * args.x.channels + first_in + c, total);
}

template <class Config>
void run_data(DataArguments<typename Config::T> args, const Tensor& like, float* sums) {
  using T = typename Config::T;
  const int64_t in = args.x.channels, chunks = ceil_div(in, Config::kIn);
  const int64_t blocks = persistent_blocks(ceil_div(args.grad.count(), Config::kWindows), chunks, 2,
                                           Config::kSharedBytes);
  const Launch on{chunks, blocks, kThreads, Config::kSharedBytes};
  if constexpr (Config::kAffine) return launch<data_kernel<Config>>(on, args);
  const Tensor rows = scratch(blocks * 2 * in, like);
  args.rows = static_cast<float*>(rows.data_ptr());
  launch<data_kernel<Config>>(on, args);
  add_rows(rows, blocks, Sums<T>{.vector = sums, .channels = in});
}

// Writes grad_x of the pixels that no window covers, one element per thread: u*x + v, or zero if u
// is null.
template <class T>
struct EdgeArguments {
  Pixels<const T> x;
  const float *u, *v;  // [C]
  Pixels<T> grad_x;
  int below, right;  // such pixels per image: in the last line, and in the last column above it
};

template <class T>
__global__ void __launch_bounds__(kThreads) edge_kernel(const EdgeArguments<T> args) {
  const Pixels<const T>& x = args.x;
  const int64_t edge = args.below + args.right, count = x.images * edge * x.channels;
  const int64_t step = grid_y() * kThreads;
  for (int64_t i = block_y() * kThreads + thread_index(); i < count; i += step) {
    const int64_t c = i % x.channels, e = i / x.channels % edge, image = i / x.channels / edge;
    const int64_t line = e < args.below ? x.height - 1 : e - args.below;
    const int64_t column = e < args.below ? e : x.width - 1;
    const int64_t pixel = (image * x.height + line) * x.width + column;
    float value = 0;
    if (args.u) {
      value = load_global(args.u + c) * to_float(load_global(x.at(pixel) + c)) +
              load_global(args.v + c);
    }
    store_global(args.grad_x.at(pixel) + c, from_float<T>(value));
  }
}

template <class T>
void run_edges(const DataArguments<T>& args) {
  const Pixels<const T>& x = args.x;
  const auto below = static_cast<int>(x.height % 2 ? x.width : 0);
  const auto right = static_cast<int>(x.width % 2 ? x.height / 2 * 2 : 0);
  const int64_t count = x.images * (below + right) * x.channels;
  if (count == 0) return;
  launch<edge_kernel<T>>(
      {1, persistent_blocks(ceil_div(count, kThreads), 1, 8, 0), kThreads},
      EdgeArguments<T>{
          .x = x, .u = args.u, .v = args.v, .grad_x = args.grad_x, .below = below, .right = right});
}

// --- dW ------------------------------------------------------------------------------

template <class T>
struct WeightArguments {
  Pixels<const T> grad, pooled;
  float* rows;    // [blocks, K C]
  int in_blocks;  // blocks of kIn channels each
  int grad_bytes, pooled_bytes;
};

// A block computes kOut x kIn of dW with eight warps, 4 x 2, from its share of the windows: kDepth
// windows at a time, in a pipeline of kStages stages.
template <class Math_>
struct WeightProduct {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kOut = 128, kIn = 128, kStages = 3;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kGradSize = kDepth * kOutLd, kStageSize = kGradSize + kDepth * kInLd;
  static constexpr int kSharedBytes =
      SharedMemory::bytes_of(kStages * kStageSize * int64_t{sizeof(T)});
};

template <class Config>
__global__ void __launch_bounds__(kThreads, 2)
    weight_kernel(const WeightArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kOut = Config::kOut, kIn = Config::kIn, kDepth = Config::kDepth;
  constexpr int kOutLd = Config::kOutLd, kInLd = Config::kInLd, kStages = Config::kStages;
  SharedMemory shared;
  T* const tiles = shared.take<T>(kStages * Config::kStageSize);

  const int64_t windows = args.grad.count(), out = args.grad.channels, in = args.pooled.channels;
  const int64_t first_out = int64_t{block_x() / args.in_blocks} * kOut;
  const int64_t first_in = int64_t{block_x() % args.in_blocks} * kIn;
  const int outs = static_cast<int>(std::min(int64_t{kOut}, out - first_out));
  const int ins = static_cast<int>(std::min(int64_t{kIn}, in - first_in));
  const int warp_row = warp_index() / 2 * 32, warp_column = warp_index() % 2 * 64;
  const TransposedRowFragment<T> grad_columns([&](int k) { return k * kOutLd + warp_row; });
  const TransposedColumnFragments<T> p_columns(kInLd);

  float dw[2][8][4] = {};
  const int64_t tile_count = (windows + kDepth - 1) / kDepth;
  pipeline<kStages>(
      static_cast<int>((tile_count - block_y() + grid_y() - 1) / grid_y()),
      [&](int step, int stage) {
        T* const grad = tiles + stage * Config::kStageSize;
        const int64_t first = (block_y() + int64_t{step} * grid_y()) * kDepth;
        const int rows = static_cast<int>(std::min(int64_t{kDepth}, windows - first));
        copy_tile<kDepth, kOut, kThreads, false>(grad, kOutLd, outs, args.grad_bytes,
                                                 Rows(args.grad, first, rows, first_out));
        copy_tile<kDepth, kIn, kThreads, false>(grad + Config::kGradSize, kInLd, ins,
                                                args.pooled_bytes,
                                                Rows(args.pooled, first, rows, first_in));
      },
      [&](int, int stage) {
        const T* const grad = tiles + stage * Config::kStageSize;
        multiply_tiles<Math, kDepth, kOutLd, kInLd>(dw, grad_columns, grad, p_columns,
                                                    grad + Config::kGradSize + warp_column);
      });

  float* const rows = args.rows + (block_y() * out + first_out) * in + first_in;
  for_pairs(dw, [&](int r, int c, float left, float right) {
    const int k = warp_row + r, column = warp_column + c;
    if (k >= outs) return;
    if (column < ins) store_global(rows + k * in + column, left);
    if (column + 1 < ins) store_global(rows + k * in + column + 1, right);
  });
}

template <class Config>
void run_weight(WeightArguments<typename Config::T> args, const Tensor& like,
                const Weight<typename Config::T>& dw) {
  using T = typename Config::T;
  args.in_blocks = static_cast<int>(ceil_div(dw.in, Config::kIn));
  const int64_t columns = ceil_div(dw.out, Config::kOut) * args.in_blocks;
  const int64_t blocks = persistent_blocks(ceil_div(args.grad.count(), Config::kDepth), columns, 2,
                                           Config::kSharedBytes);
  const Tensor rows = scratch(blocks * dw.out * dw.in, like);
  args.rows = static_cast<float*>(rows.data_ptr());
  launch<weight_kernel<Config>>({columns, blocks, kThreads, Config::kSharedBytes}, args);
  Sums<T> to{};
  to.set_weight(dw, 0, dw.out, 1);
  add_rows(rows, blocks, to);
}

}  // namespace
}  // namespace dense_ext
