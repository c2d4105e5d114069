// The kernel of bn_relu_conv3x3.cu's backward, which has the formulas and the shapes.

#pragma once

#include "reduce.cuh"
#include "taps.cuh"

namespace dense_ext {
namespace {

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
  int grad_bytes, y_bytes, z_bytes, weight_bytes, grad_bn_bytes;  // per access
  int stages;  // patches in shared memory at a time
};

// A block takes kIn channels of z and all of K, at most kOut, and goes through patches of kPixels
// slots. A warp computes da for one of kParts parts of the channels and a stack of kStack lines,
// and dW for 16 x 16 channels and all taps.
template <class Math_, int kOut_, int kStack_, int kParts_, bool kWide_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  template <bool kOther>
  using OfWidth = Backward<Math, kOut_, kStack_, kParts_, kOther>;
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kStack = kStack_, kParts = kParts_;
  static constexpr int kDataWarps = kWarps / kParts;  // they share the pixels of da
  static constexpr int kPixels = kDataWarps * 16 * kStack;
  // Whether it runs only with memory for two stages. Otherwise it takes one if two do not fit.
  static constexpr bool kAlwaysTwo = kPixels == 256;
  // Enough for the bordered patch of one image of 16 x 16 in 256 slots, two of 8 x 8 in 128 slots,
  // or halves of two such images in 64 slots.
  static constexpr int kBordered = kPixels == 256 ? 336 : kPixels == 128 ? 200 : 120;
  static constexpr int kOut = kOut_, kIn = kWarps * 16 * 16 / kOut;
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kStageSize = 2 * kBordered * kOutLd + kPixels * kInLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kInLd);
  using OutVector = UnitVector<T, kOut>;
  static constexpr int kVectors = 2 * OutVector::kSize + 3 * kIn;
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

// The phases of a block, and what they share.
template <class Config>
struct BackwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  using OutVector = typename Config::OutVector;
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kIn = Config::kIn, kBordered = Config::kBordered;
  static constexpr int kOutLd = Config::kOutLd, kInLd = Config::kInLd;
  static constexpr bool kWide = Config::kWide;
  static constexpr int kColumns = kIn / 8 / Config::kParts;  // fragments of da per warp
  using DataGradient = float[Config::kStack][kColumns][4];

  // A patch in shared memory. dy replaces grad, and grad_bn replaces z.
  struct Stage {
    T *dy, *y;  // [kBordered][kOut]
    T* z;       // [kPixels][kIn]
    __device__ explicit Stage(T* begin)
        : dy(begin), y(dy + kBordered * kOutLd), z(y + kBordered * kOutLd) {}
  };

  const BackwardArguments<T>& args;
  const Patches& patches;
  T *const stages, *const weights;  // weights: [kTaps][kOut][kIn]
  float* const u;
  const typename Config::Places places;
  BitsOf<T>* const keep;  // for each slot all ones if it has a pixel, else zero
  float* const sums;
  const int64_t first_in;
  const int out, ins;  // ins: the block's channels of z
  const RowFragment<T> data_rows;
  const TransposedColumnFragments<T> columns;
  float dw[kTaps][1][2][4] = {};  // the warp's part of dW
  float sum_g[kColumns][2] = {}, sum_gz[kColumns][2] = {};

  __device__ BackwardBlock(const BackwardArguments<T>& args, SharedMemory shared)
      : args(args),
        patches(args.patches),
        stages(shared.take<T>(args.stages * Config::kStageSize)),
        weights(shared.take<T>(kTaps * Config::kTapSize)),
        u(shared.take<float>(Config::kVectors)),
        places(shared.take<int>(Config::Places::kInts), args.patches),
        keep(shared.take<BitsOf<T>>(kPixels)),
        sums(shared.take<float>(Config::kDataWarps * 2 * kIn)),
        first_in(int64_t{block_x()} * kIn),
        out(static_cast<int>(args.y.channels)),
        ins(static_cast<int>(std::min(int64_t{kIn}, args.z.channels - first_in))),
        data_rows([&](int r) { return args.patches.corner(data_row() + r) * kOutLd; }),
        columns(kInLd) {}

  __device__ void run() {
    load_vectors();
    load_taps<kOut, kIn, kThreads>(weights, kInLd, args.weight, args.weight_bytes, 0, first_in);
    int stage = 0, parity = 0;
    places.locate(block_y(), parity);
    sync_threads();
    load(parity, 0);
    copy_async_commit();
    for (int patch = block_y(); patch < patches.count; patch += grid_y(), parity = 1 - parity) {
      const int next = patch + grid_y();
      if (next < patches.count) places.locate(next, 1 - parity);
      mark_slots(parity);
      copy_async_wait<0>();
      sync_threads();
      if (two_stages() && next < patches.count) load(1 - parity, 1 - stage);
      copy_async_commit();
      const Stage at(stages + stage * Config::kStageSize);
      form_dy(at, parity);
      sync_threads();
      if (args.wants_weight && weight_row() < out) add_weight_gradient(at);
      form_grad_bn(at);
      sync_threads();
      store(at, parity);
      sync_threads();
      if (two_stages()) {
        stage = 1 - stage;
      } else if (next < patches.count) {
        load(1 - parity, 0);
        copy_async_commit();
      }
    }
    copy_async_wait<0>();
    write_sums();
    if (args.wants_weight) write_weight_gradient();
  }

  __device__ __forceinline__ void load_vectors() const {
    copy_vector<kOut, kThreads>(u, args.u, 0, out, OutVector::place);
    copy_vector<kOut, kThreads>(v(), args.v, 0, out, OutVector::place);
    copy_vector<kIn, kThreads>(mean(), args.mean, first_in, args.z.channels);
    copy_vector<kIn, kThreads>(scale(), args.scale, first_in, args.z.channels);
    copy_vector<kIn, kThreads>(shift(), args.shift, first_in, args.z.channels);
  }

  __device__ __forceinline__ void load(int parity, int stage) const {
    const Stage to(stages + stage * Config::kStageSize);
    const auto row_of = [&](const Pixels<const T>& of) {
      return ChosenRows(Rows(of, places.origin(parity), 0, 0),
                        [&](int p) { return places.source(parity, p); });
    };
    copy_tile<kBordered, kOut, kThreads, kWide>(to.dy, kOutLd, out, args.grad_bytes,
                                                row_of(args.grad));
    copy_tile<kBordered, kOut, kThreads, kWide>(to.y, kOutLd, out, args.y_bytes, row_of(args.y));
    copy_tile<kPixels, kIn, kThreads, kWide>(
        to.z, kInLd, ins, args.z_bytes,
        ChosenRows(Rows(args.z, places.origin(parity), 0, first_in),
                   [&](int r) { return places.center(parity, r); }));
  }

  // Fills `keep`.
  __device__ __forceinline__ void mark_slots(int parity) const {
    DENSE_EXT_UNROLL for (int begin = 0; begin < kPixels; begin += kThreads) {
      const int r = begin + thread_index();
      if (r >= kPixels) break;
      const bool used = places.center(parity, r) >= 0;
      store_shared(keep + r, used ? static_cast<BitsOf<T>>(~0u) : BitsOf<T>{0});
    }
  }

  // Forms dy in place of grad. Outside the images it stays zero, where v would remain otherwise.
  __device__ __forceinline__ void form_dy(const Stage& at, int parity) const {
    const Units<T, kOut, kThreads> units;
    units.for_columns([&](int c, int) {
      float us[OutVector::kElements], vs[OutVector::kElements];
      OutVector::load(us, u, c);
      OutVector::load(vs, v(), c);
      units.template for_rows<kBordered>([&](int p, int) {
        if (places.source(parity, p) < 0) return;
        auto* const to = unit_at(at.dy + p * kOutLd + c);
        Vector<T, 16> g(load_shared(to));
        const Vector<T, 16> y(load_shared(unit_at(at.y + p * kOutLd + c)));
        DENSE_EXT_UNROLL for (int e = 0; e < OutVector::kElements; e++) {
          g.value[e] += us[e] * y.value[e] + vs[e];
        }
        store_shared(to, g.stored());
      });
    });
  }

  // Adds to dW: goes down the lines of dy, and pairs each with the lines of z that use it, which
  // are the same line and the two before.
  __device__ __forceinline__ void add_weight_gradient(const Stage& at) {
    float scales[2], shifts[2];
    DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
      scales[j] = load_shared(scale() + weight_column() + 8 * j + lane_index() / 4);
      shifts[j] = load_shared(shift() + weight_column() + 8 * j + lane_index() / 4);
    }
    const int width = patches.images * patches.columns;
    DENSE_EXT_NO_UNROLL for (int x = 0; x < width; x += Math::kDepth) {
      const int first = x / 16 * 16 * patches.lines + x % 16;
      const TransposedRowFragment<T> rows(
          [&](int r) { return patches.corner(first + r) * kOutLd + weight_row(); });
      uint32_t b[3][2][2] = {};  // line l is b[l % 3]
      DENSE_EXT_NO_UNROLL for (int begin = 0; begin < patches.rows + 2; begin += 3) {
        DENSE_EXT_UNROLL for (int i = 0; i < 3; i++) {
          const int l = begin + i, slot = first + 16 * l;
          if (l >= patches.rows + 2) break;
          uint32_t a[3][4];
          DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
            rows.load(a[dx], at.dy + (l * patches.line + dx) * kOutLd);
          }
          const auto add = [&](int before) {
            DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
              multiply<Math>(dw[kTaps - 1 - (3 * before + dx)], a, b[(i + 3 - before) % 3], 0, dx);
            }
          };
          if (l >= 2) add(2);
          if (l >= 1 && l <= patches.rows) add(1);
          if (l < patches.rows) {
            columns.load(b[i][0], b[i][1], at.z + slot * kInLd + weight_column(), kInLd);
            DENSE_EXT_UNROLL for (int j = 0; j < 2; j++) {
              activate_column<T>(b[i][j], scales[j], shifts[j]);
            }
            keep_rows<T>(b[i], keep + slot);
            add(0);
          }
        }
      }
    }
  }

  // Forms grad_bn in place of z, and adds to the sums.
  __device__ __forceinline__ void form_grad_bn(const Stage& at) {
    DataGradient da = {};
    multiply_data(da, at);
    sync_threads();  // all warps have read z for dW before grad_bn overwrites it

    const Position lane;
    Float2 s[kColumns], t[kColumns], m[kColumns];
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
      const int column = data_column() + 8 * j + lane.column;
      s[j] = load_pair(scale() + column), t[j] = load_pair(shift() + column);
      m[j] = load_pair(mean() + column);
    }
    DENSE_EXT_UNROLL for (int i = 0; i < 2 * Config::kStack; i++) {
      const int r = data_row() + 8 * i + lane.row;
      if (!load_shared(keep + r)) continue;
      DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
        T* to = at.z + r * kInLd + data_column() + 8 * j + lane.column;
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
  }
  // The transposed convolution of dy: the taps in reverse order.
  __device__ __forceinline__ void multiply_data(DataGradient& da, const Stage& at) const {
    const auto load_tap = [&](uint32_t (&b)[2][2], int tap, int k, int j) {
      const T* of_tap = weights + (kTaps - 1 - tap) * Config::kTapSize;
      columns.load(b[0], b[1], of_tap + k * kInLd + data_column() + 8 * j, kInLd);
    };
    const int depth = kOut > 32 ? out : kOut;  // for example 48 of 64: worth a branch
    multiply_taps<Math, kOut>(da, data_rows, at.dy, kOutLd, patches.line, depth, load_tap);
  }

  // Stores grad_bn, or adds it to what earlier pieces of K have stored.
  __device__ __forceinline__ void store(const Stage& at, int parity) const {
    const ChosenRows row_of(Rows(args.grad_bn, places.origin(parity), 0, first_in),
                            [&](int r) { return places.center(parity, r); });
    if (args.accumulate) {
      for (int i = thread_index(); i < kPixels * kIn; i += kThreads) {
        const Row<T> before = row_of(i / kIn);
        if (!before.exists || i % kIn >= ins) continue;
        T* to = at.z + i / kIn * kInLd + i % kIn;
        store_shared(to, from_float<T>(to_float(load_shared(to)) +
                                       to_float(load_global(before.data + i % kIn))));
      }
      sync_threads();
    }
    store_tile<kPixels, kIn, kThreads, kWide>(at.z, kInLd, ins, args.grad_bn_bytes, row_of);
  }

  __device__ __forceinline__ void write_sums() {
    float* row = args.rows + block_y() * args.row_size + first_in;
    write_column_sums<kThreads, Config::kDataWarps, kIn>(
        sums, sum_g, sum_gz, warp_index() % Config::kDataWarps, data_column(), ins, row,
        row + args.z.channels);
  }
  __device__ __forceinline__ void write_weight_gradient() const {
    float* row = args.rows + block_y() * args.row_size + 2 * args.z.channels + first_in;
    DENSE_EXT_UNROLL for (int tap = 0; tap < kTaps; tap++) {
      for_pairs(dw[tap], [&](int r, int column, float left, float right) {
        const int k = weight_row() + r, b = weight_column() + column;
        float* to = row + (int64_t{tap} * out + k) * args.z.channels + b;
        if (k < out && b < ins) store_global(to, left);
        if (k < out && b + 1 < ins) store_global(to + 1, right);
      });
    }
  }

  __device__ bool two_stages() const { return Config::kAlwaysTwo || args.stages > 1; }

  // The warp's positions in da and dW.
  __device__ static int data_row() {
    return warp_index() % Config::kDataWarps * 16 * Config::kStack;
  }
  __device__ static int data_column() { return warp_index() / Config::kDataWarps * 8 * kColumns; }
  __device__ static int weight_row() { return warp_index() % (kOut / 16) * 16; }
  __device__ static int weight_column() { return warp_index() / (kOut / 16) * 16; }

  __device__ float* v() const { return u + OutVector::kSize; }
  __device__ float* mean() const { return v() + OutVector::kSize; }
  __device__ float* scale() const { return mean() + kIn; }
  __device__ float* shift() const { return scale() + kIn; }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const BackwardArguments<typename Config::T> args) {
  BackwardBlock<Config>(args, SharedMemory()).run();
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

}  // namespace
}  // namespace dense_ext
