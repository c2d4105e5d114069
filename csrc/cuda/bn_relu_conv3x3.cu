// Forward:  y = conv3x3(relu(scale*z + shift), W), where the activation is padded with zeros, and
//           y's mean and variance.
// Backward: dy = grad + u*y + v
//           g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0;  grad_bn = g
//           sums = [sum g, sum g*(z - mean)];  dW[k, b, tap] = sum_p dy[p, k] * a[p + tap, b]
//
// z, grad_bn [N, H, W, B]; y, grad [N, H, W, K]; each with its own pixel stride. W, dW
// [K, B, 3, 3], any strides.
//
// Elements moved per pixel: B + K forward, 2 B + 2 K backward. A block takes patches of images.
// Forward copies z with its border to shared memory and activates it there once; the nine taps are
// nine shifted views of it. Backward does the same with dy, for both gradients in one kernel. There
// a block takes a chunk of B, keeps dW of all taps in registers for all its patches, and keeps W in
// shared memory. Patches read their common borders, and chunks of B read dy, from the L2 cache.
//
// The kernels are bound by reading fragments from shared memory, at 128 bytes per cycle. So a warp
// goes down lines of 16 pixels, and reads a line's fragment once for the three lines of taps that
// use it. For B = 128 and K = 32 in 16 bits, y takes 2304 bytes per pixel if a warp has 64 pixels x
// 32 channels, in large patches, and 3456 if it has 64 x 16. g takes as many, and dW 2240 or 2432.

#include <torch/csrc/stable/library.h>

#include "patch.cuh"
#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kTaps = 9;

// The distance between two taps of the weight in shared memory, in elements. Padding puts
// neighbouring taps, which neighbouring threads write, into different banks.
template <class T>
constexpr int tap_size(int elements) {
  return padded<T>(elements);
}

// Copies W[first_out.., first_in.., tap] to shared memory as [tap][kOut][kIn], with zeros beyond
// its ends. Consecutive threads read consecutive elements of a contiguous weight.
template <int kOut, int kIn, int kThreads, class T>
__device__ __forceinline__ void load_taps(T* to, int ld, const Weight<const T>& weight,
                                          int64_t first_out, int64_t first_in) {
  DENSE_EXT_NO_UNROLL for (int i = thread_index(); i < kTaps * kOut * kIn; i += kThreads) {
    const int tap = i % kTaps, in = i / kTaps % kIn, out = i / kTaps / kIn;
    const int64_t o = first_out + out, c = first_in + in;
    const bool valid = o < weight.out && c < weight.in;
    const T value = valid ? load_global(weight.data + o * weight.out_stride + c * weight.in_stride +
                                        weight.tap_offset(tap))
                          : T{0};
    store_shared(to + tap * tap_size<T>(kOut * ld) + out * ld + in, value);
  }
}

// c += the nine products for a stack of lines of 16 pixels, over the first `depth` of kDepth
// channels. Line i of c uses lines i to i + 2 of a, each at three columns. The offsets of `rows`
// are relative to `tile`, whose lines have `line` rows of `ld` elements. `load_tap(b, t, k, j)`
// loads two fragments, with the columns from 8 j on, of the weight for line t / 3 and column t % 3.
template <class Math, int kDepth, class T, int kStack, int kColumns, class LoadTap>
__device__ __forceinline__ void multiply_taps(float (&c)[kStack][kColumns][4],
                                              const RowFragment<T>& rows, const T* tile, int ld,
                                              int line, int depth, const LoadTap& load_tap) {
  DENSE_EXT_NO_UNROLL for (int dx = 0; dx < 3; dx++) {
    DENSE_EXT_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) {
      if (k >= depth) break;
      uint32_t a[kStack + 2][4];
      DENSE_EXT_UNROLL for (int l = 0; l < kStack + 2; l++) {
        rows.load(a[l], tile + (l * line + dx) * ld + k);
      }
      DENSE_EXT_UNROLL for (int dy = 0; dy < 3; dy++) {
        DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j += 2) {
          uint32_t b[2][2];
          load_tap(b, 3 * dy + dx, k, j);
          multiply<Math>(c, a, b, j, dy);
        }
      }
    }
  }
}

// Whether large patches are faster, given that they fit. They read at least a sixth less per slot.
// But if there are too few patches for all multiprocessors, or larger patches are emptier, the
// busiest multiprocessor may have more slots to process.
template <class Large, class Small, class T>
bool large_patches_pay(const Pixels<T>& z, int64_t columns) {
  const auto slots_in_turn = [&](auto config) {
    using Config = decltype(config);
    return ceil_div(patches_of<Config>(z).count * columns, current_device().multiprocessors) *
           Config::kPixels;
  };
  return 6 * slots_in_turn(Large{}) <= 7 * slots_in_turn(Small{});
}

// --- forward ---------------------------------------------------------------------------------

template <class T>
struct ForwardArguments {
  Pixels<const T> z;
  const float *scale, *shift;  // [B]
  Weight<const T> weight;      // [K, B, 3, 3]
  Pixels<T> y;
  float* moments;  // [blocks, 1 + 2 K]; null if not wanted
  Patches patches;
  int z_bytes, y_bytes;
  int kept;  // chunks of the weight in shared memory: all, or one at a time
};

// A block computes kOut channels of patches of kPixels slots, and steps through B in chunks of
// kDepth; while it computes with one chunk, it loads the next. A warp has a stack of kStack lines
// and one of kParts parts of the channels.
template <class Math_, int kOut_, int kStack_, int kParts_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kThreads = 256, kStack = kStack_, kParts = kParts_;
  static constexpr int kPixels = kThreads / kWarp / kParts * 16 * kStack, kOut = kOut_;
  // Enough for the bordered patch of eight images of 8 x 8 in 512 slots, or one of 16 x 16 in 256.
  static constexpr int kBordered = kPixels == 512 ? 736 : kPixels == 256 ? 360 : 200;
  static constexpr int kBlocks = kPixels == 512 ? 1 : 2;  // per multiprocessor, by registers
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kStageSize =
      kBordered * kLd > kPixels* kOutLd ? kBordered * kLd : kPixels * kOutLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kLd), kWeightSize = kTaps * kTapSize;
  using Places = dense_ext::Places<kPixels, kBordered, kThreads>;
  using Statistics = ColumnMoments<T, kOut, kThreads>;

  static constexpr int shared_bytes(int64_t kept) {
    return SharedMemory::bytes_of(2 * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kept * kWeightSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(2 * 2 * kDepth * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(Places::kInts * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(Statistics::kScratch * int64_t{sizeof(float)});
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    forward_kernel(const ForwardArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels, kOut = Config::kOut;
  constexpr int kDepth = Config::kDepth, kLd = Config::kLd, kBordered = Config::kBordered;
  SharedMemory shared;
  T* const stages = shared.take<T>(2 * Config::kStageSize);
  T* const weights = shared.take<T>(args.kept * Config::kWeightSize);
  float* const vectors = shared.take<float>(2 * 2 * kDepth);
  const typename Config::Places places(shared.take<int>(Config::Places::kInts), args.patches);
  typename Config::Statistics statistics(shared.take<float>(Config::Statistics::kScratch));

  const Patches& patches = args.patches;
  const int in = static_cast<int>(args.z.channels);
  const int64_t first_out = int64_t{block_x()} * kOut;
  const int outs = static_cast<int>(std::min(int64_t{kOut}, args.y.channels - first_out));
  const int chunks = (in + kDepth - 1) / kDepth;
  constexpr int kColumns = kOut / 8 / Config::kParts;
  const int warp_row = warp_index() / Config::kParts * 16 * Config::kStack;
  const int warp_column = warp_index() % Config::kParts * 8 * kColumns;
  const RowFragment<T> rows([&](int r) { return patches.corner(warp_row + r) * kLd; });
  const ColumnFragments<T> columns(kLd);

  const auto load = [&](int patch, int parity, int chunk, int stage) {
    const int64_t origin = patches.origin(patch);
    const int c = chunk * kDepth;
    copy_tile<kBordered, kDepth, kThreads>(
        stages + stage * Config::kStageSize, kLd, in - c, args.z_bytes,
        [&](int p) {
          const int source = places.source(parity, p);
          return source >= 0 ? args.z.at(origin + source) + c : nullptr;
        },
        patches.bordered);
    float* vector = vectors + stage * 2 * kDepth;
    copy_vector<kDepth, kThreads>(vector, args.scale, c, in);
    copy_vector<kDepth, kThreads>(vector + kDepth, args.shift, c, in);
  };

  if (args.kept == chunks) {
    for (int chunk = 0; chunk < chunks; chunk++) {
      load_taps<kOut, kDepth, kThreads>(weights + chunk * Config::kWeightSize, kLd, args.weight,
                                        first_out, chunk * kDepth);
    }
  }
  int stage = 0, parity = 0;
  places.locate(block_y(), parity);
  sync_threads();
  load(block_y(), parity, 0, stage);
  copy_async_commit();
  for (int patch = block_y(); patch < patches.count; patch += grid_y(), parity = 1 - parity) {
    const int next = patch + grid_y();
    if (next < patches.count) places.locate(next, 1 - parity);
    float y[Config::kStack][kColumns][4] = {};
    for (int chunk = 0; chunk < chunks; chunk++, stage = 1 - stage) {
      copy_async_wait<0>();
      sync_threads();
      if (chunk + 1 < chunks) {
        load(patch, parity, chunk + 1, 1 - stage);
      } else if (next < patches.count) {
        load(next, 1 - parity, 0, 1 - stage);
      }
      copy_async_commit();
      if (args.kept < chunks) {
        load_taps<kOut, kDepth, kThreads>(weights, kLd, args.weight, first_out, chunk * kDepth);
      }
      T* const z = stages + stage * Config::kStageSize;
      const float* scale = vectors + stage * 2 * kDepth;
      activate_rows<kDepth, kThreads>(z, kLd, patches.bordered, scale, scale + kDepth,
                                      [&](int p) { return places.source(parity, p) >= 0; });
      sync_threads();
      const T* weight = weights + (args.kept < chunks ? 0 : chunk) * Config::kWeightSize;
      const auto load_tap = [&](uint32_t (&b)[2][2], int tap, int k, int j) {
        const T* of_tap = weight + tap * Config::kTapSize;
        columns.load(b[0], b[1], of_tap + (warp_column + 8 * j) * kLd + k, kLd);
      };
      multiply_taps<Math, kDepth>(y, rows, z, kLd, patches.line, kDepth, load_tap);
    }
    sync_threads();

    // The last chunk's memory now holds the patch of y.
    T* const tile = stages + (1 - stage) * Config::kStageSize;
    for_pairs(y, [&](int row, int column, float left, float right) {
      store_pair(tile + (warp_row + row) * Config::kOutLd + warp_column + column, left, right);
    });
    sync_threads();
    const int64_t origin = patches.origin(patch);
    store_tile<kPixels, kOut, kThreads>(tile, Config::kOutLd, outs, args.y_bytes, [&](int r) {
      const int from = places.center(parity, r);
      return from >= 0 ? args.y.at(origin + from) + first_out : nullptr;
    });
    if (args.moments) {
      statistics.template add<kPixels>(tile, Config::kOutLd,
                                       [&](int r) { return places.center(parity, r) >= 0; });
    }
    sync_threads();
  }
  copy_async_wait<0>();
  if (args.moments) {
    const int64_t out = args.y.channels;
    statistics.write(args.moments + block_y() * (1 + 2 * out), first_out, out, outs);
  }
}

template <class Config>
void run_forward(ForwardArguments<typename Config::T> args, const Tensor& like, float* mean,
                 float* var) {
  const int64_t out = args.y.channels, columns = ceil_div(out, Config::kOut);
  const int64_t chunks = ceil_div(args.z.channels, Config::kDepth);
  const bool keep = Config::shared_bytes(chunks) <= current_device().shared_bytes;
  args.kept = static_cast<int>(keep ? chunks : 1);
  args.patches = patches_of<Config>(args.z);
  const int shared = Config::shared_bytes(args.kept);
  const int64_t blocks = persistent_blocks(args.patches.count, columns, Config::kBlocks, shared);
  with_moments(blocks, out, like, mean, var, [&](float* moments) {
    args.moments = moments;
    launch<forward_kernel<Config>>({columns, blocks, Config::kThreads, shared}, args);
  });
}

void bn_relu_conv3x3_forward(const Tensor& z, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& y,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                             bool tf32) {
  const OnDeviceOf device(z);
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
    ForwardArguments<T> args{.z = zs,
                             .scale = channels<const float>(scale, "scale", in),
                             .shift = channels<const float>(shift, "shift", in),
                             .weight = weight_of<const T>(weight, "weight", out, in, 3),
                             .y = pixels<T>(y, "y", zs, out)};
    args.z_bytes = AccessBytes().add(args.z);
    args.y_bytes = AccessBytes().add(args.y);
    float* means = channels<float>(mean, "mean", out);
    float* vars = channels<float>(var, "var", out);
    if (zs.count() == 0) {
      if (mean) zero(*mean);
      if (var) zero(*var);
      return;
    }
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      // For float, fragments are half as deep and tiles twice as large.
      constexpr int kStack = sizeof(T) == 2 ? 2 : 1;
      using Wide = Forward<Math, 48, kStack, 1>;
      using Small = Forward<Math, 32, 2 * kStack, 2>;
      static_assert(Small::shared_bytes(1) <= kSmallestSharedBytes);
      static_assert(Wide::shared_bytes(1) <= kSmallestSharedBytes);
      if (ceil_div(out, 48) < ceil_div(out, 32)) return run_forward<Wide>(args, z, means, vars);
      if constexpr (sizeof(T) == 2) {
        using Large = Forward<Math, 32, 4, 1>;
        const int room = current_device().shared_bytes;
        if (Large::shared_bytes(ceil_div(in, Large::kDepth)) <= room &&
            large_patches_pay<Large, Small>(zs, ceil_div(out, 32))) {
          return run_forward<Large>(args, z, means, vars);
        }
      }
      run_forward<Small>(args, z, means, vars);
    });
  });
}

// --- backward --------------------------------------------------------------------------------

template <class T>
struct BackwardArguments {
  Pixels<const T> grad, y;
  const float *u, *v;  // [K]
  Pixels<const T> z;
  const float *mean, *scale, *shift;  // [B]
  Weight<const T> weight;             // [K, B, 3, 3]
  Pixels<T> grad_bn;
  float* rows;  // [blocks, 2 B + 9 K B]: sums, and dW as [tap][K][B] if wanted
  int64_t row_size;
  bool wants_weight, accumulate;  // accumulate adds to grad_bn
  Patches patches;
  int grad_bytes, y_bytes, z_bytes, grad_bn_bytes;
  int stages;  // patches in shared memory at a time
};

// A block takes kIn channels of z and all of K, at most kOut, and goes through patches of kPixels
// slots. A warp computes da for one of kParts parts of the channels and a stack of kStack lines,
// and dW for 16 x 16 channels and all taps.
template <class Math_, int kOut_, int kStack_, int kParts_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kStack = kStack_, kParts = kParts_;
  static constexpr int kDataWarps = kWarps / kParts;  // they share the pixels of da
  static constexpr int kPixels = kDataWarps * 16 * kStack;
  // Enough for the bordered patch of one image of 16 x 16 in 256 slots, two of 8 x 8 in 128 slots,
  // or halves of two such images in 64 slots.
  static constexpr int kBordered = kPixels == 256 ? 336 : kPixels == 128 ? 200 : 120;
  static constexpr int kOut = kOut_, kIn = kWarps * 16 * 16 / kOut;
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kStageSize = 2 * kBordered * kOutLd + kPixels * kInLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kInLd), kVectors = 2 * kOut + 3 * kIn;
  using Places = dense_ext::Places<kPixels, kBordered, kThreads>;

  static constexpr int shared_bytes(int stages) {
    return SharedMemory::bytes_of(stages * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kTaps * kTapSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(Places::kInts * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(kPixels * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kDataWarps * 2 * kIn * int64_t{sizeof(float)});
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const BackwardArguments<typename Config::T> args) {
  using Math = typename Config::Math;
  using T = typename Config::T;
  constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels, kOut = Config::kOut;
  constexpr int kIn = Config::kIn, kOutLd = Config::kOutLd, kInLd = Config::kInLd;
  constexpr int kBordered = Config::kBordered, kColumns = kIn / 8 / Config::kParts;
  SharedMemory shared;
  T* const stages = shared.take<T>(args.stages * Config::kStageSize);
  T* const weights = shared.take<T>(kTaps * Config::kTapSize);
  float* const u = shared.take<float>(Config::kVectors);
  float *const v = u + kOut, *const mean = v + kOut, *const scale = mean + kIn;
  float* const shift = scale + kIn;
  const typename Config::Places places(shared.take<int>(Config::Places::kInts), args.patches);
  BitsOf<T>* const keep = shared.take<BitsOf<T>>(kPixels);
  float* const sums = shared.take<float>(Config::kDataWarps * 2 * kIn);

  const Patches& patches = args.patches;
  const int64_t first_in = int64_t{block_x()} * kIn;
  const int out = static_cast<int>(args.y.channels);
  const int ins = static_cast<int>(std::min(int64_t{kIn}, args.z.channels - first_in));
  copy_vector<kOut, kThreads>(u, args.u, 0, out);
  copy_vector<kOut, kThreads>(v, args.v, 0, out);
  copy_vector<kIn, kThreads>(mean, args.mean, first_in, args.z.channels);
  copy_vector<kIn, kThreads>(scale, args.scale, first_in, args.z.channels);
  copy_vector<kIn, kThreads>(shift, args.shift, first_in, args.z.channels);
  load_taps<kOut, kIn, kThreads>(weights, kInLd, args.weight, 0, first_in);

  const int warp = warp_index(), lane = lane_index();
  const int data_row = warp % Config::kDataWarps * 16 * Config::kStack;
  const int data_column = warp / Config::kDataWarps * 8 * kColumns;
  const int weight_row = warp % (kOut / 16) * 16, weight_column = warp / (kOut / 16) * 16;
  const RowFragment<T> data_rows([&](int r) { return patches.corner(data_row + r) * kOutLd; });
  const TransposedColumnFragments<T> columns(kInLd);
  const Position at;

  float dw[kTaps][1][2][4] = {};
  float sum_g[kColumns][2] = {}, sum_gz[kColumns][2] = {};

  const auto load = [&](int patch, int parity, int stage) {
    const int64_t origin = patches.origin(patch);
    T* grad = stages + stage * Config::kStageSize;
    T *y = grad + kBordered * kOutLd, *z = y + kBordered * kOutLd;
    const auto row_of = [&](const Pixels<const T>& of) {
      return [&](int p) {
        const int from = places.source(parity, p);
        return from >= 0 ? of.at(origin + from) : nullptr;
      };
    };
    copy_tile<kBordered, kOut, kThreads>(grad, kOutLd, out, args.grad_bytes, row_of(args.grad),
                                         patches.bordered);
    copy_tile<kBordered, kOut, kThreads>(y, kOutLd, out, args.y_bytes, row_of(args.y),
                                         patches.bordered);
    copy_tile<kPixels, kIn, kThreads>(z, kInLd, ins, args.z_bytes, [&](int r) {
      const int from = places.center(parity, r);
      return from >= 0 ? args.z.at(origin + from) + first_in : nullptr;
    });
  };

  const bool ahead = args.stages > 1;
  int stage = 0, parity = 0;
  places.locate(block_y(), parity);
  sync_threads();
  load(block_y(), parity, 0);
  copy_async_commit();
  for (int patch = block_y(); patch < patches.count; patch += grid_y(), parity = 1 - parity) {
    const int next = patch + grid_y();
    const int64_t origin = patches.origin(patch);
    if (next < patches.count) places.locate(next, 1 - parity);
    for (int r = thread_index(); r < kPixels; r += kThreads) {
      const bool there = places.center(parity, r) >= 0;
      store_shared(keep + r, there ? static_cast<BitsOf<T>>(~0u) : BitsOf<T>{0});
    }
    copy_async_wait<0>();
    sync_threads();
    if (ahead && next < patches.count) load(next, 1 - parity, 1 - stage);
    copy_async_commit();
    T* const dy = stages + stage * Config::kStageSize;
    const T* const y = dy + kBordered * kOutLd;
    T* const z = dy + 2 * kBordered * kOutLd;

    // Forms dy in place of grad. Outside the images it stays zero, where v would remain otherwise.
    // A thread has the same channels in all its rows.
    constexpr int kPairs = kOut / 2;
    static_assert(kThreads % kPairs == 0);
    const int pair = thread_index() % kPairs * 2;
    const Float2 us = load_pair(u + pair), vs = load_pair(v + pair);
    for (int p = spread(thread_index() / kPairs); p < patches.bordered; p += kThreads / kPairs) {
      if (places.source(parity, p) < 0) continue;
      T* to = dy + p * kOutLd + pair;
      const Float2 g = load_pair(to), value = load_pair(y + p * kOutLd + pair);
      store_pair(to, g.x + (us.x * value.x + vs.x), g.y + (us.y * value.y + vs.y));
    }
    sync_threads();

    if (args.wants_weight && weight_row < out) {
      float scales[2], shifts[2];
      DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
        scales[j] = load_shared(scale + weight_column + 8 * j + lane / 4);
        shifts[j] = load_shared(shift + weight_column + 8 * j + lane / 4);
      }
      // Goes down the lines of dy, and pairs each with the lines of z that use it: the same line
      // and the two before.
      const int width = patches.images * patches.columns;
      DENSE_EXT_NO_UNROLL for (int x = 0; x < width; x += Math::kDepth) {
        const int first = x / 16 * 16 * patches.lines + x % 16;
        const TransposedRowFragment<T> rows(
            [&](int r) { return patches.corner(first + r) * kOutLd + weight_row; });
        uint32_t b[3][2][2] = {};
        DENSE_EXT_NO_UNROLL for (int l = 0; l < patches.rows + 2; l++) {
          const int slot = first + 16 * l;
          DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
            DENSE_EXT_UNROLL for (int i = 0; i < 2; i++) {
              b[2][j][i] = b[1][j][i];
              b[1][j][i] = b[0][j][i];
            }
          }
          if (l < patches.rows) {
            columns.load(b[0][0], b[0][1], z + slot * kInLd + weight_column, kInLd);
          }
          uint32_t a[3][4];
          DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
            rows.load(a[dx], dy + (l * patches.line + dx) * kOutLd);
          }
          const auto add = [&](int before) {
            DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
              multiply<Math>(dw[kTaps - 1 - (3 * before + dx)], a, b[before], 0, dx);
            }
          };
          if (l >= 2) add(2);
          if (l >= 1 && l <= patches.rows) add(1);
          if (l < patches.rows) {
            DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
              activate_column<T>(b[0][j], scales[j], shifts[j]);
            }
            keep_rows<T>(b[0], keep + slot);
            add(0);
          }
        }
      }
    }

    // The taps in reverse order, for the transposed convolution.
    float da[Config::kStack][kColumns][4] = {};
    const auto load_tap = [&](uint32_t (&b)[2][2], int tap, int k, int j) {
      const T* of_tap = weights + (kTaps - 1 - tap) * Config::kTapSize;
      columns.load(b[0], b[1], of_tap + k * kInLd + data_column + 8 * j, kInLd);
    };
    const int depth = kOut > 32 ? out : kOut;  // for example 48 of 64: worth a branch
    multiply_taps<Math, kOut>(da, data_rows, dy, kOutLd, patches.line, depth, load_tap);
    sync_threads();  // all warps have read z for dW before grad_bn overwrites it

    Float2 s[kColumns], t[kColumns], m[kColumns];
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
      const int column = data_column + 8 * j + at.column;
      s[j] = load_pair(scale + column), t[j] = load_pair(shift + column);
      m[j] = load_pair(mean + column);
    }
    DENSE_EXT_UNROLL for (int i = 0; i < 2 * Config::kStack; i++) {
      const int r = data_row + 8 * i + at.row;
      if (!load_shared(keep + r)) continue;
      DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
        T* to = z + r * kInLd + data_column + 8 * j + at.column;
        const float* g = da[i / 2][j] + i % 2 * 2;
        const Float2 value = load_pair(to);
        const float gx = value.x * s[j].x + t[j].x <= 0 ? 0.0f : g[0];
        const float gy = value.y * s[j].y + t[j].y <= 0 ? 0.0f : g[1];
        sum_g[j][0] += gx;
        sum_g[j][1] += gy;
        sum_gz[j][0] += gx * (value.x - m[j].x);
        sum_gz[j][1] += gy * (value.y - m[j].y);
        store_pair(to, gx, gy);
      }
    }
    sync_threads();
    const auto row_of = [&](int r) {
      const int from = places.center(parity, r);
      return from >= 0 ? args.grad_bn.at(origin + from) + first_in : nullptr;
    };
    if (args.accumulate) {
      for (int i = thread_index(); i < kPixels * kIn; i += kThreads) {
        const T* before = row_of(i / kIn);
        if (!before || i % kIn >= ins) continue;
        T* to = z + i / kIn * kInLd + i % kIn;
        store_shared(
            to, from_float<T>(to_float(load_shared(to)) + to_float(load_global(before + i % kIn))));
      }
      sync_threads();
    }
    store_tile<kPixels, kIn, kThreads>(z, kInLd, ins, args.grad_bn_bytes, row_of);
    sync_threads();
    if (ahead) {
      stage = 1 - stage;
    } else if (next < patches.count) {
      load(next, 1 - parity, 0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();

  float* row = args.rows + block_y() * args.row_size;
  write_column_sums<kThreads, Config::kDataWarps, kIn>(
      sums, sum_g, sum_gz, warp % Config::kDataWarps, data_column, ins, row + first_in,
      row + args.z.channels + first_in);
  if (!args.wants_weight) return;
  row += 2 * args.z.channels + first_in;
  DENSE_EXT_UNROLL for (int tap = 0; tap < kTaps; tap++) {
    DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
      DENSE_EXT_UNROLL for (int e = 0; e < 4; e++) {
        const int k = weight_row + at.row + e / 2 * 8;
        const int b = weight_column + 8 * j + at.column + e % 2;
        if (k < out && b < ins) {
          store_global(row + (int64_t{tap} * out + k) * args.z.channels + b, dw[tap][0][j][e]);
        }
      }
    }
  }
}

template <class Config>
void run_backward(BackwardArguments<typename Config::T> args, const Tensor& like,
                  const Sums<typename Config::T>& sums) {
  const int64_t chunks = ceil_div(args.z.channels, Config::kIn);
  args.stages = Config::shared_bytes(2) <= current_device().shared_bytes ? 2 : 1;
  args.patches = patches_of<Config>(args.z);
  const int shared = Config::shared_bytes(args.stages);
  const int64_t blocks = persistent_blocks(args.patches.count, chunks, 1, shared);
  const Tensor rows = scratch(blocks * args.row_size, like);
  args.rows = static_cast<float*>(rows.data_ptr());
  launch<backward_kernel<Config>>({chunks, blocks, Config::kThreads, shared}, args);
  add_rows(rows, blocks, sums);
}

void bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& u, const Tensor& v,
                              const Tensor& z, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, const Tensor& grad_bn,
                              const Tensor& sums, const std::optional<Tensor>& grad_weight,
                              bool tf32) {
  const OnDeviceOf device(z);
  dispatch(z, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto zs = pixels<const T>(z, "z");
    const int64_t in = zs.channels, out = weight.size(0);
    const BackwardArguments<T> args{.grad = pixels<const T>(grad, "grad", zs, out),
                                    .y = pixels<const T>(y, "y", zs, out),
                                    .u = channels<const float>(u, "u", out),
                                    .v = channels<const float>(v, "v", out),
                                    .z = zs,
                                    .mean = channels<const float>(mean, "mean", in),
                                    .scale = channels<const float>(scale, "scale", in),
                                    .shift = channels<const float>(shift, "shift", in),
                                    .weight = weight_of<const T>(weight, "weight", out, in, 3),
                                    .grad_bn = pixels<T>(grad_bn, "grad_bn", zs, in),
                                    .wants_weight = grad_weight.has_value()};
    float* sum = channels<float>(sums, "sums", 2 * in);
    const Weight<T> dw = weight_of<T>(grad_weight, "grad_weight", out, in, 3);
    if (zs.count() == 0) {
      zero(sums);
      if (grad_weight) zero(*grad_weight);
      return;
    }
    // If K does not fit, pieces of it run one after another and add to grad_bn and the sums.
    const auto run_pieces = [&](auto config) {
      using Config = decltype(config);
      for (int64_t k = 0; k < out; k += Config::kOut) {
        const int64_t count = std::min<int64_t>(Config::kOut, out - k);
        BackwardArguments<T> piece = args;
        piece.grad = slice(args.grad, k, count);
        piece.y = slice(args.y, k, count);
        piece.u += k, piece.v += k;
        piece.weight.data += k * args.weight.out_stride;
        piece.weight.out = count;
        piece.row_size = 2 * in + (grad_weight ? kTaps * count * in : 0);
        piece.accumulate = k > 0;
        piece.grad_bytes = AccessBytes().add(piece.grad);
        piece.y_bytes = AccessBytes().add(piece.y);
        piece.z_bytes = AccessBytes().add(piece.z);
        piece.grad_bn_bytes = AccessBytes().add(piece.grad_bn);
        Sums<T> to{.vector = sum, .vector_size = 2 * in, .accumulate = k > 0};
        if (grad_weight) to.set_weight(dw, k, count, kTaps);
        run_backward<Config>(piece, z, to);
      }
    };
    with_arithmetic<T>(tf32, [&](auto math) {
      using Math = decltype(math);
      if constexpr (sizeof(T) == 2) {  // for float, tiles would not fit in shared memory
        using Wide = Backward<Math, 64, 2, 2>;
        using Large = Backward<Math, 32, 4, 2>;
        using Small = Backward<Math, 32, 4, 4>;
        static_assert(Small::shared_bytes(1) <= kSmallestSharedBytes);
        const int room = current_device().shared_bytes;
        if (Wide::shared_bytes(1) <= room && ceil_div(out, 64) < ceil_div(out, 32)) {
          run_pieces(Wide{});
        } else if (Large::shared_bytes(2) <= room &&
                   large_patches_pay<Large, Small>(zs, ceil_div(in, Large::kIn))) {
          run_pieces(Large{});
        } else {
          run_pieces(Small{});
        }
      } else {
        using Only = Backward<Math, 32, 2, 2>;
        static_assert(Only::shared_bytes(1) <= kSmallestSharedBytes);
        run_pieces(Only{});
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_conv3x3_forward", TORCH_BOX(&bn_relu_conv3x3_forward));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace dense_ext
