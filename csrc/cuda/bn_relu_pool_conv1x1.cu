// Forward:  p = avg_pool2x2(relu(scale*x + shift));  y = p @ W^T
// Backward: da = (grad @ W) / 4 for each pixel of a window
//           g = da where scale*x + shift > 0, else 0;  grad_x = scale*g
//           sums = [sum g, sum g*(x - mean)];  dW = grad^T @ p
// Backward through the norm: first the sums, then grad_x = scale*g + u*x + v.
//
// x, grad_x [N, H, W, C]; y, grad [N, H/2, W/2, K]; each with its own pixel stride. W, dW [K, C],
// any strides.
//
// Elements moved per output pixel: 4 C + K forward, 10 C + 2 K backward, each from device memory
// once. Blocks that run at the same time share inputs through the L2 cache. Forward they share x if
// K exceeds a block's. Backward they share grad, since each takes a chunk of C, and both factors of
// dW.
//
// Backward is two kernels, since a block that covers all of K has no registers for dW. The first
// writes grad_x and the sums, and stores p in scratch. This takes C elements written and C read;
// otherwise the second kernel would read 4 C and pool them again for every 128 of K. In addition,
// each block writes a row of sums, or its part of dW.
//
// Backward through the norm moves 14 C + 3 K. The first kernel runs twice, because u and v follow
// from the sums: first without grad_x, then for grad_x only. That moves less than reading grad_x
// and x once more and writing grad_x again.
//
// x is loaded into registers, not into shared memory. A thread loads 16 bytes of each pixel of a
// window, a step or a row ahead, into 16 registers. In shared memory, x of a step of 64 windows
// would take 16 KiB, to be written and read; only p, a quarter of that, has to be there.

#include <torch/csrc/stable/library.h>

#include "batch_norm.cuh"
#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 256;

// --- windows -----------------------------------------------------------------------------------

// The index of the first pixel of an output pixel's window.
template <class T>
__device__ __forceinline__ int64_t corner_of(const Pixels<T>& x, int64_t window) {
  const int64_t out_height = x.height / 2, out_width = x.width / 2;
  const int64_t line = window / out_width;  // counted over all images
  return (line / out_height * x.height + line % out_height * 2) * x.width + window % out_width * 2;
}

// A thread loads 16 bytes of a pixel at a time, which is a unit of its channels, and computes with
// four channels at a time.
template <class T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));

// Converts the q-th four channels of a unit to and from float.
template <class T>
__device__ __forceinline__ void widen(float (&four)[4], const Bytes<16>& unit, int q) {
  DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      const Float2 pair = unpack<T>(unit.data[2 * q + i / 2]);
      four[i] = i % 2 ? pair.y : pair.x;
    } else {
      four[i] = float_of_bits(unit.data[i]);
    }
  }
}
template <class T>
__device__ __forceinline__ void narrow(Bytes<16>& unit, int q, const float (&four)[4]) {
  if constexpr (sizeof(T) == 2) {
    unit.data[2 * q] = pack<T>(four[0], four[1]);
    unit.data[2 * q + 1] = pack<T>(four[2], four[3]);
  } else {
    DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) unit.data[i] = bits_of(four[i]);
  }
}

// Loads and stores four floats in shared memory.
__device__ __forceinline__ void load_four(float (&four)[4], const float* at) {
  widen<float>(four, load_shared(reinterpret_cast<const Bytes<16>*>(at)), 0);
}
__device__ __forceinline__ void store_four(float* at, const float (&four)[4]) {
  Bytes<16> unit;
  narrow<float>(unit, 0, four);
  store_shared(reinterpret_cast<Bytes<16>*>(at), unit);
}

// A thread's unit of each pixel of a window.
template <class T>
struct Window {
  Bytes<16> pixels[4];

  // Loads from x; the unit of the window's first pixel is at `corner`. Channels from `columns` on
  // become zeros.
  __device__ __forceinline__ void load(const Pixels<const T>& x, const T* corner, int columns,
                                       int bytes) {
    DENSE_EXT_UNROLL for (auto& pixel : pixels) pixel = {};
    for_accesses(x, columns, bytes, [&](auto width, void* part, int64_t offset) {
      using V = Bytes<decltype(width)::value>;
      const V value = load_global(reinterpret_cast<const V*>(corner + offset));
      memcpy(part, &value, sizeof value);
    });
  }

  // Stores the channels below `columns` to x.
  __device__ __forceinline__ void store(const Pixels<T>& x, T* corner, int columns, int bytes) {
    for_accesses(x, columns, bytes, [&](auto width, void* part, int64_t offset) {
      using V = Bytes<decltype(width)::value>;
      V value;
      memcpy(&value, part, sizeof value);
      store_global(reinterpret_cast<V*>(corner + offset), value);
    });
  }

  // The unit of p. Its scale and shift are in shared memory, in groups of four that are kStride
  // apart.
  template <int kStride>
  __device__ __forceinline__ Bytes<16> pooled(const float* scales, const float* shifts) const {
    Bytes<16> unit;
    DENSE_EXT_UNROLL for (int q = 0; q < kUnit<T> / 4; q++) {
      float scale[4], shift[4], sum[4] = {};
      load_four(scale, scales + q * kStride);
      load_four(shift, shifts + q * kStride);
      DENSE_EXT_UNROLL for (const auto& pixel : pixels) {
        float value[4];
        widen<T>(value, pixel, q);
        DENSE_EXT_UNROLL for (int i = 0; i < 4; i++) sum[i] += relu(value[i] * scale[i] + shift[i]);
      }
      DENSE_EXT_UNROLL for (auto& value : sum) value *= 0.25f;
      narrow<T>(unit, q, sum);
    }
    return unit;
  }

 private:
  // Calls body(Width<n>{}, part of a unit, its offset from the corner) for each access to x.
  template <class Like, class Body>
  __device__ __forceinline__ void for_accesses(const Pixels<Like>& x, int columns, int bytes,
                                               const Body& body) {
    DENSE_EXT_UNROLL for (int pixel = 0; pixel < 4; pixel++) {
      const int64_t offset = (pixel / 2 * x.width + pixel % 2) * x.stride;
      // Inside the loop, since single elements of all pixels at once would take twice the
      // registers.
      for_width<T>(bytes, [&](auto width) {
        constexpr int kElements = decltype(width)::value / static_cast<int>(sizeof(T));
        DENSE_EXT_UNROLL for (int i = 0; i < kUnit<T>; i += kElements) {
          if (i >= columns) continue;
          body(width, reinterpret_cast<T*>(&pixels[pixel]) + i, offset + i);
        }
      });
    }
  }
};

// --- forward -----------------------------------------------------------------------------------

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

void bn_relu_pool_conv1x1_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const Tensor& weight, const Tensor& y, bool tf32) {
  const OnDeviceOf device(x);
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    const Pixels<T> windows{nullptr, xs.images, xs.height / 2, xs.width / 2, 0, 0};
    const int64_t in = xs.channels, out = weight.size(0);
    const auto ys = pixels<T>(y, "y", windows, out);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    if (ys.count() == 0) return;
    const Tensor dense = with_dense_rows(weight, weights);
    const ForwardArguments<T> args{
        .x = xs,
        .scale = scales,
        .shift = shifts,
        .weight = weights,
        .y = ys,
        .x_bytes = AccessBytes().add(xs),
        .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
        .y_bytes = AccessBytes().add(ys)};
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      // With FMAs the product takes far longer than pooling x again for every 128 of K.
      if constexpr (!Math::kExact) {
        if (out > 128) return run_forward<Forward<Math, 256>>(args);
      }
      run_forward<Forward<Math, 128>>(args);
    });
  });
}

// --- backward: grad_x, the sums and p ----------------------------------------------------------

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
  add_rows(rows, blocks, Sums<T>{.vector = sums, .vector_size = 2 * in});
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

// --- backward: dW ------------------------------------------------------------------------------

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

// Arguments that this pass does not need are absent, except grad_x.
void run_backward(Pass pass, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mean,
                  const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& u,
                  const std::optional<Tensor>& v, const Tensor& weight, const Tensor& grad_x,
                  const std::optional<Tensor>& sums, const std::optional<Tensor>& grad_weight,
                  bool tf32) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto xs = pixels<const T>(x, "x");
    Pixels<T> pooled{nullptr, xs.images, xs.height / 2, xs.width / 2, xs.channels, 0};
    const int64_t in = xs.channels, out = weight.size(0), windows = pooled.count();
    const auto gradient = pixels<const T>(grad, "grad", pooled, out);
    const auto* means = channels<const float>(mean, "mean", in);
    const auto* scales = channels<const float>(scale, "scale", in);
    const auto* shifts = channels<const float>(shift, "shift", in);
    const auto* us = channels<const float>(u, "u", in);
    const auto* vs = channels<const float>(v, "v", in);
    auto weights = weight_of<const T>(weight, "weight", out, in, 1);
    const auto grad_xs = pixels<T>(grad_x, "grad_x", xs, in);
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 1);
    if (windows == 0) {  // no images, or images too small for a window
      zero(grad_x);
      if (sums) zero(*sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    const Tensor dense = with_dense_rows(weight, weights);
    std::optional<Tensor> p;
    if (grad_weight) {
      pooled.stride = round_up(in, kUnit<T>);
      const int64_t size[] = {windows, pooled.stride};
      p = torch::stable::new_empty(x, size);
      pooled.data = static_cast<T*>(p->data_ptr());
    }
    DataArguments<T> args{.grad = gradient,
                          .x = xs,
                          .mean = means,
                          .scale = scales,
                          .shift = shifts,
                          .u = us,
                          .v = vs,
                          .weight = weights,
                          .grad_x = grad_xs,
                          .pooled = pooled,
                          .rows = nullptr,
                          .grad_bytes = AccessBytes().add(gradient),
                          .x_bytes = AccessBytes().add(xs),
                          .weight_bytes = AccessBytes().add(weights.data, in, weights.out_stride),
                          .grad_x_bytes = AccessBytes().add(grad_xs)};
    if (pass == Pass::kSums) {
      args.grad_x.data = nullptr;
    } else {
      run_edges(args);
    }
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if (pass == Pass::kAffine) return run_data<Data<Math, true>>(args, x, sum);
      run_data<Data<Math, false>>(args, x, sum);
      if (!grad_weight) return;
      const WeightArguments<T> weight_args{
          .grad = gradient,
          .pooled = {pooled.data, pooled.images, pooled.height, pooled.width, in, pooled.stride},
          .rows = nullptr,
          .in_blocks = 0,
          .grad_bytes = args.grad_bytes,
          .pooled_bytes = 16};  // whole units, which hold zeros beyond C
      run_weight<WeightProduct<Math>>(weight_args, x, dw);
    });
  });
}

void bn_relu_pool_conv1x1_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                   const Tensor& scale, const Tensor& shift, const Tensor& weight,
                                   const Tensor& grad_x, const Tensor& sums,
                                   const std::optional<Tensor>& grad_weight, bool tf32) {
  const OnDeviceOf device(x);
  run_backward(Pass::kWhole, grad, x, mean, scale, shift, {}, {}, weight, grad_x, sums, grad_weight,
               tf32);
}

void bn_relu_pool_conv1x1_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                        const Tensor& var, const Tensor& norm_weight, double eps,
                                        const Tensor& scale, const Tensor& shift,
                                        const Tensor& weight, const Tensor& grad_x,
                                        const Tensor& grad_norm_weight,
                                        const Tensor& grad_norm_bias,
                                        const std::optional<Tensor>& grad_weight, bool tf32) {
  const OnDeviceOf device(x);
  const ThroughNorm norm(x, mean, var, norm_weight, eps, grad_norm_weight, grad_norm_bias);
  run_backward(Pass::kSums, grad, x, mean, scale, shift, {}, {}, weight, grad_x, norm.sums,
               grad_weight, tf32);
  norm.gradient.run();
  run_backward(Pass::kAffine, grad, x, {}, scale, shift, norm.u, norm.v, weight, grad_x, {}, {},
               tf32);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_pool_conv1x1_forward", TORCH_BOX(&bn_relu_pool_conv1x1_forward));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&bn_relu_pool_conv1x1_backward));
  m.impl("bn_relu_pool_conv1x1_norm_backward", TORCH_BOX(&bn_relu_pool_conv1x1_norm_backward));
}

}  // namespace dense_ext
