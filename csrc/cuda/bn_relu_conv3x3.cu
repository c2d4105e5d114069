// Forward:  y = conv3x3(relu(scale*z + shift), W), padded with zeros after the activation, and
//           y's mean and variance.
// Backward: dy = grad + u*y + v
//           g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0;  grad_bn = g
//           sums = [sum g, sum g*(z - mean)];  dW[k, b, tap] = sum_p dy[p, k] * a[p + tap, b]
//
// z, grad_bn [N, H, W, B], y, grad [N, H, W, K], pixels their own strides apart; W, dW
// [K, B, 3, 3], any strides.
//
// Elements moved a pixel: B + K forward, 2 B + 2 K backward. A block takes patches of images:
// forward z comes to shared memory with its border, is activated there once, and the nine taps are
// nine shifted views of it. Backward does the same with dy, for both gradients in one kernel: a
// block takes a chunk of B, keeps dW of all taps in registers over its patches, and W in shared
// memory. What patches share at their borders, and chunks of B of dy, comes from the L2 cache.

#include <torch/csrc/stable/library.h>

#include "patch.cuh"
#include "product.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kTaps = 9;

// Elements from a tap of the weight to the next in shared memory: in other banks, for neighbouring
// threads write neighbouring taps.
template <class T>
constexpr int tap_size(int elements) {
  return padded<T>(elements);
}

// W[first_out.., first_in.., tap] as [tap][kOut][kIn] in shared memory, zeros beyond its ends.
// Threads that follow one another read what follows in a contiguous weight.
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

// --- forward ---------------------------------------------------------------------------------

template <class T>
struct ForwardArguments {
  Pixels<const T> z;
  const float *scale, *shift;  // [B]
  Weight<const T> weight;      // [K, B, 3, 3]
  Pixels<T> y;
  float* moments;  // [blocks, 1 + 2 K]; null: not wanted
  Patches patches;
  int z_bytes, y_bytes;
  int kept;  // chunks of the weight in shared memory: all, or one at a time
};

// A block makes kOut channels of patches of kPixels, its warps a part of the pixels each, stepping
// through B in chunks of kDepth; while it computes one chunk, the next is on its way.
template <class Math_, int kOut_>
struct Forward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kThreads = 256, kWarpRows = sizeof(T) == 2 ? 2 : 1;  // fragments of a warp
  static constexpr int kPixels = kThreads / kWarp * 16 * kWarpRows, kOut = kOut_;
  static constexpr int kBordered = sizeof(T) == 2 ? 360 : 200;
  static constexpr int kBlocks = Math::kExact ? 1 : 2;  // of a multiprocessor, by registers
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kLd = padded<T>(kDepth), kOutLd = padded<T>(kOut);
  static constexpr int kStageSize =
      kBordered * kLd > kPixels* kOutLd ? kBordered * kLd : kPixels * kOutLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kLd), kWeightSize = kTaps * kTapSize;
  using Statistics = ColumnMoments<T, kOut, kThreads>;

  static constexpr int shared_bytes(int64_t kept) {
    return SharedMemory::bytes_of(2 * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kept * kWeightSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(2 * 2 * kDepth * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(2 * kBordered * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(kPixels * int64_t{sizeof(int)}) +
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
  int* const sources = shared.take<int>(2 * kBordered);
  int* const corners = shared.take<int>(kPixels);
  typename Config::Statistics statistics(shared.take<float>(Config::Statistics::kScratch));

  const Patches& patches = args.patches;
  const int in = static_cast<int>(args.z.channels);
  const int64_t first_out = int64_t{block_x()} * kOut;
  const int outs = static_cast<int>(std::min(int64_t{kOut}, args.y.channels - first_out));
  const int chunks = (in + kDepth - 1) / kDepth, line = patches.line();
  const int pixels = patches.images * patches.rows * patches.columns;
  constexpr int kWarpRows = Config::kWarpRows;
  const int warp_row = warp_index() * 16 * kWarpRows;
  const auto corner_row = [&](int i) {
    return RowFragment<T>([&](int r) { return patches.corner(warp_row + 16 * i + r) * kLd; });
  };
  const RowFragment<T> rows[2] = {corner_row(0), corner_row(kWarpRows - 1)};
  const ColumnFragments<T> columns(kLd);

  // Where the pixels of a patch lie: known one patch ahead.
  const auto locate = [&](int64_t patch, int parity) {
    for (int p = thread_index(); p < kBordered; p += kThreads) {
      store_shared(sources + parity * kBordered + p, patches.source(patch, p));
    }
  };
  const auto load = [&](int64_t patch, int parity, int chunk, int stage) {
    const int64_t origin = patches.origin(patch);
    const int c = chunk * kDepth;
    copy_tile<kBordered, kDepth, kThreads>(
        stages + stage * Config::kStageSize, kLd, in - c, args.z_bytes, [&](int p) {
          const int source = load_shared(sources + parity * kBordered + p);
          return source >= 0 ? args.z.at(origin + source) + c : nullptr;
        });
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
  const int64_t patch_count = patches.count();
  int stage = 0, parity = 0;
  // Divisions once, not in every patch.
  for (int r = thread_index(); r < kPixels; r += kThreads) {
    store_shared(corners + r, patches.corner(r));
  }
  locate(block_y(), parity);
  sync_threads();
  load(block_y(), parity, 0, stage);
  copy_async_commit();
  for (int64_t patch = block_y(); patch < patch_count; patch += grid_y(), parity = 1 - parity) {
    const int64_t next = patch + grid_y();
    if (next < patch_count) locate(next, 1 - parity);
    const int* source = sources + parity * kBordered;
    float y[kWarpRows][kOut / 8][4] = {};
    for (int chunk = 0; chunk < chunks; chunk++, stage = 1 - stage) {
      copy_async_wait<0>();
      sync_threads();
      if (chunk + 1 < chunks) {
        load(patch, parity, chunk + 1, 1 - stage);
      } else if (next < patch_count) {
        load(next, 1 - parity, 0, 1 - stage);
      }
      copy_async_commit();
      if (args.kept < chunks) {
        load_taps<kOut, kDepth, kThreads>(weights, kLd, args.weight, first_out, chunk * kDepth);
      }
      T* const z = stages + stage * Config::kStageSize;
      const float* scale = vectors + stage * 2 * kDepth;
      activate_rows<kBordered, kDepth, kThreads>(
          z, kLd, scale, scale + kDepth, [&](int p) { return load_shared(source + p) >= 0; });
      sync_threads();
      const T* weight = weights + (args.kept < chunks ? 0 : chunk) * Config::kWeightSize;
      DENSE_EXT_NO_UNROLL for (int tap = 0; tap < kTaps; tap++) {
        const T* shifted = z + (tap / 3 * line + tap % 3) * kLd;
        const T* of_tap = weight + tap * Config::kTapSize;
        DENSE_EXT_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) {
          uint32_t a[kWarpRows][4];
          DENSE_EXT_UNROLL for (int i = 0; i < kWarpRows; i++) rows[i].load(a[i], shifted + k);
          DENSE_EXT_UNROLL for (int j = 0; j < kOut / 8; j += 2) {
            uint32_t b[2][2];
            columns.load(b[0], b[1], of_tap + 8 * j * kLd + k, kLd);
            multiply<Math>(y, a, b, j);
          }
        }
      }
    }
    sync_threads();

    // The last chunk's memory holds the patch of y now.
    T* const tile = stages + (1 - stage) * Config::kStageSize;
    for_pairs(y, [&](int row, int column, float left, float right) {
      store_pair(tile + (warp_row + row) * Config::kOutLd + column, left, right);
    });
    sync_threads();
    const auto source_of = [&](int r) {
      return r < pixels ? load_shared(source + load_shared(corners + r) + line + 1) : -1;
    };
    const int64_t origin = patches.origin(patch);
    store_tile<kPixels, kOut, kThreads>(tile, Config::kOutLd, outs, args.y_bytes, [&](int r) {
      const int from = source_of(r);
      return from >= 0 ? args.y.at(origin + from) + first_out : nullptr;
    });
    if (args.moments) {
      statistics.template add<kPixels>(tile, Config::kOutLd,
                                       [&](int r) { return source_of(r) >= 0; });
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
  static_assert(Config::shared_bytes(1) <= kSmallestSharedBytes);
  const bool keep = Config::shared_bytes(chunks) <= current_device().shared_bytes;
  args.kept = static_cast<int>(keep ? chunks : 1);
  args.patches = patches_of(args.z, Config::kPixels, Config::kBordered);
  const int shared = Config::shared_bytes(args.kept);
  const int64_t blocks = persistent_blocks(args.patches.count(), columns, Config::kBlocks, shared);
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
      if (ceil_div(out, 48) < ceil_div(out, 32)) {
        run_forward<Forward<Math, 48>>(args, z, means, vars);
      } else {
        run_forward<Forward<Math, 32>>(args, z, means, vars);
      }
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
  bool wants_weight, accumulate;  // adds to grad_bn
  Patches patches;
  int grad_bytes, y_bytes, z_bytes, grad_bn_bytes;
  int stages;  // patches in shared memory at a time
};

// A block takes kIn channels of z and all of K, at most kOut, and goes through patches of kPixels:
// a warp has da of 32 channels for its part of the pixels, and dW of 16 x 16 channels, all taps.
template <class Math_, int kOut_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int kWarps = kNarrow ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kPixels = 16 * kWarps, kBordered = kNarrow ? 200 : 104;
  static constexpr int kOut = kOut_, kIn = kWarps * 16 * 16 / kOut;
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kDataWarps = kWarps / (kIn / 32);  // that share the pixels of da
  static constexpr int kDataRows = kPixels / kDataWarps / 16, kDataColumns = 4;  // fragments
  static constexpr int kStageSize = 2 * kBordered * kOutLd + kPixels * kInLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kInLd), kVectors = 2 * kOut + 3 * kIn;

  static constexpr int shared_bytes(int stages) {
    return SharedMemory::bytes_of(stages * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kTaps * kTapSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(2 * kBordered * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(kPixels * int64_t{sizeof(int)}) +
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
  constexpr int kBordered = Config::kBordered;
  SharedMemory shared;
  T* const stages = shared.take<T>(args.stages * Config::kStageSize);
  T* const weights = shared.take<T>(kTaps * Config::kTapSize);
  float* const u = shared.take<float>(Config::kVectors);
  float *const v = u + kOut, *const mean = v + kOut, *const scale = mean + kIn;
  float* const shift = scale + kIn;
  int* const sources = shared.take<int>(2 * kBordered);
  int* const corners = shared.take<int>(kPixels);
  BitsOf<T>* const keep = shared.take<BitsOf<T>>(kPixels);
  float* const sums = shared.take<float>(Config::kDataWarps * 2 * kIn);

  const Patches& patches = args.patches;
  const int64_t first_in = int64_t{block_x()} * kIn;
  const int out = static_cast<int>(args.y.channels);
  const int ins = static_cast<int>(std::min(int64_t{kIn}, args.z.channels - first_in));
  const int line = patches.line(), pixels = patches.images * patches.rows * patches.columns;
  copy_vector<kOut, kThreads>(u, args.u, 0, out);
  copy_vector<kOut, kThreads>(v, args.v, 0, out);
  copy_vector<kIn, kThreads>(mean, args.mean, first_in, args.z.channels);
  copy_vector<kIn, kThreads>(scale, args.scale, first_in, args.z.channels);
  copy_vector<kIn, kThreads>(shift, args.shift, first_in, args.z.channels);
  load_taps<kOut, kIn, kThreads>(weights, kInLd, args.weight, 0, first_in);

  const int warp = warp_index(), lane = lane_index();
  const int data_row = warp % Config::kDataWarps * 16 * Config::kDataRows;
  const int data_column = warp / Config::kDataWarps * 32;
  const int weight_row = warp % (kOut / 16) * 16, weight_column = warp / (kOut / 16) * 16;
  const TransposedColumnFragments<T> columns(kInLd);
  const Position at;

  float dw[kTaps][1][2][4] = {};
  float sum_g[Config::kDataColumns][2] = {}, sum_gz[Config::kDataColumns][2] = {};

  const auto locate = [&](int64_t patch, int parity) {
    for (int p = thread_index(); p < kBordered; p += kThreads) {
      store_shared(sources + parity * kBordered + p, patches.source(patch, p));
    }
  };
  const auto center = [&](const int* source, int r) {
    return r < pixels ? load_shared(source + load_shared(corners + r) + line + 1) : -1;
  };
  const auto load = [&](int64_t patch, int parity, int stage) {
    const int64_t origin = patches.origin(patch);
    const int* source = sources + parity * kBordered;
    T* grad = stages + stage * Config::kStageSize;
    T *y = grad + kBordered * kOutLd, *z = y + kBordered * kOutLd;
    const auto row_of = [&](const Pixels<const T>& of) {
      return [&](int p) {
        const int from = load_shared(source + p);
        return from >= 0 ? of.at(origin + from) : nullptr;
      };
    };
    copy_tile<kBordered, kOut, kThreads>(grad, kOutLd, out, args.grad_bytes, row_of(args.grad));
    copy_tile<kBordered, kOut, kThreads>(y, kOutLd, out, args.y_bytes, row_of(args.y));
    copy_tile<kPixels, kIn, kThreads>(z, kInLd, ins, args.z_bytes, [&](int r) {
      const int from = center(source, r);
      return from >= 0 ? args.z.at(origin + from) + first_in : nullptr;
    });
  };

  const int64_t patch_count = patches.count();
  const bool ahead = args.stages > 1;
  int stage = 0, parity = 0;
  // Divisions once, not in every patch.
  for (int r = thread_index(); r < kPixels; r += kThreads) {
    store_shared(corners + r, patches.corner(r));
  }
  locate(block_y(), parity);
  sync_threads();
  load(block_y(), parity, 0);
  copy_async_commit();
  for (int64_t patch = block_y(); patch < patch_count; patch += grid_y(), parity = 1 - parity) {
    const int64_t next = patch + grid_y(), origin = patches.origin(patch);
    if (next < patch_count) locate(next, 1 - parity);
    const int* source = sources + parity * kBordered;
    for (int r = thread_index(); r < kPixels; r += kThreads) {
      keep[r] = center(source, r) >= 0 ? static_cast<BitsOf<T>>(~0u) : BitsOf<T>{0};
    }
    copy_async_wait<0>();
    sync_threads();
    if (ahead && next < patch_count) load(next, 1 - parity, 1 - stage);
    copy_async_commit();
    T* const dy = stages + stage * Config::kStageSize;
    const T* const y = dy + kBordered * kOutLd;
    T* const z = dy + 2 * kBordered * kOutLd;

    // dy in place of grad; zero outside the images, where v would remain.
    for (int i = thread_index(); i < kBordered * kOut / 2; i += kThreads) {
      const int p = spread(i / (kOut / 2)), k = i % (kOut / 2) * 2;
      if (load_shared(source + p) < 0) continue;
      T* to = dy + p * kOutLd + k;
      const Float2 g = load_pair(to), value = load_pair(y + p * kOutLd + k);
      const Float2 us = load_pair(u + k), vs = load_pair(v + k);
      store_pair(to, g.x + (us.x * value.x + vs.x), g.y + (us.y * value.y + vs.y));
    }
    sync_threads();

    // Tap t of the pixel whose corner is at c sees dy at c + 2 lines + 2 pixels - its own offset.
    const auto shift_of = [&](int tap) { return ((2 - tap / 3) * line + 2 - tap % 3) * kOutLd; };

    if (args.wants_weight) {
      float scales[2], shifts[2];
      DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
        scales[j] = load_shared(scale + weight_column + 8 * j + lane / 4);
        shifts[j] = load_shared(shift + weight_column + 8 * j + lane / 4);
      }
      DENSE_EXT_NO_UNROLL for (int k = 0; k < kPixels; k += Math::kDepth) {
        const TransposedRowFragment<T> rows(
            [&](int r) { return load_shared(corners + k + r) * kOutLd + weight_row; });
        uint32_t b[2][2];
        columns.load(b[0], b[1], z + k * kInLd + weight_column, kInLd);
        DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
          activate_column<T>(b[j], scales[j], shifts[j]);
          keep_rows<T>(b[j], keep + k);
        }
        DENSE_EXT_UNROLL for (int tap = 0; tap < kTaps; tap++) {
          uint32_t a[1][4];
          rows.load(a[0], dy + shift_of(tap));
          multiply<Math>(dw[tap], a, b);
        }
      }
    }

    float da[Config::kDataRows][Config::kDataColumns][4] = {};
    const auto corner_row = [&](int i) {
      return RowFragment<T>(
          [&](int r) { return load_shared(corners + data_row + 16 * i + r) * kOutLd; });
    };
    const RowFragment<T> rows[2] = {corner_row(0), corner_row(Config::kDataRows - 1)};
    DENSE_EXT_NO_UNROLL for (int tap = 0; tap < kTaps; tap++) {
      const T* of_tap = weights + tap * Config::kTapSize + data_column;
      DENSE_EXT_UNROLL for (int k = 0; k < kOut; k += Math::kDepth) {
        uint32_t a[Config::kDataRows][4], b[Config::kDataColumns][2];
        DENSE_EXT_UNROLL for (int i = 0; i < Config::kDataRows; i++) {
          rows[i].load(a[i], dy + shift_of(tap) + k);
        }
        DENSE_EXT_UNROLL for (int j = 0; j < Config::kDataColumns; j += 2) {
          columns.load(b[j], b[j + 1], of_tap + k * kInLd + 8 * j, kInLd);
        }
        multiply<Math>(da, a, b);
      }
    }
    sync_threads();  // z becomes grad_bn, which other warps have read for dW

    DENSE_EXT_UNROLL for (int i = 0; i < Config::kDataRows; i++) {
      DENSE_EXT_UNROLL for (int half = 0; half < 2; half++) {
        const int r = data_row + 16 * i + at.row + 8 * half;
        if (!keep[r]) continue;
        DENSE_EXT_UNROLL for (int j = 0; j < Config::kDataColumns; j++) {
          const int column = data_column + 8 * j + at.column;
          const Float2 s = load_pair(scale + column), t = load_pair(shift + column);
          const Float2 m = load_pair(mean + column);
          T* to = z + r * kInLd + column;
          const Float2 value = load_pair(to);
          const float gx = value.x * s.x + t.x <= 0 ? 0.0f : da[i][j][2 * half];
          const float gy = value.y * s.y + t.y <= 0 ? 0.0f : da[i][j][2 * half + 1];
          sum_g[j][0] += gx;
          sum_g[j][1] += gy;
          sum_gz[j][0] += gx * (value.x - m.x);
          sum_gz[j][1] += gy * (value.y - m.y);
          store_pair(to, gx, gy);
        }
      }
    }
    sync_threads();
    const auto row_of = [&](int r) {
      const int from = center(source, r);
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
    } else if (next < patch_count) {
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
  args.patches = patches_of(args.z, Config::kPixels, Config::kBordered);
  const int shared = Config::shared_bytes(args.stages);
  const int64_t blocks = persistent_blocks(args.patches.count(), chunks, 1, shared);
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
    // What doesn't fit is done in pieces of K, each adding its part to grad_bn and to the sums.
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
      if constexpr (sizeof(T) == 2) {  // float's tiles would not fit shared memory
        using Wide = Backward<Math, 64>;
        const bool fits = Wide::shared_bytes(1) <= current_device().shared_bytes;
        if (fits && ceil_div(out, 64) < ceil_div(out, 32)) return run_pieces(Wide{});
      }
      using Narrow = Backward<Math, 32>;
      static_assert(Narrow::shared_bytes(1) <= kSmallestSharedBytes);
      run_pieces(Narrow{});
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, DENSE_EXT_DISPATCH_KEY, m) {
  m.impl("bn_relu_conv3x3_forward", TORCH_BOX(&bn_relu_conv3x3_forward));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace dense_ext
