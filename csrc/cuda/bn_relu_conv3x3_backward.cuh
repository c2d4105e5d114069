// The kernel of bn_relu_conv3x3.cu's backward, which has the formulas and the shapes.

#pragma once

#include "reduce.cuh"
#include "stages.cuh"
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
// slots. Producer warps load a patch and form its dy, while the consumers work on the one before:
// data warps compute da, each for a stack of kStack lines, and weight warps compute dW, each for
// 16 channels of K, 8 or 16 of z, and all taps.
template <class Math_, int kOut_, int kStack_, bool kWide_>
struct Backward {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr bool kWide = kWide_;
  // For narrow accesses, large patches have too few registers.
  template <bool kOther>
  using OfWidth = Backward<Math, kOut_, kOther ? kStack_ : std::min(kStack_, 2), kOther>;
  static constexpr int kOut = kOut_, kIn = 32, kStack = kStack_;
  // Fragments of z's channels per weight warp. With one, two warps on a scheduler hide each other's
  // latency.
  static constexpr int kFragments = sizeof(T) == 2 && kOut <= 32 ? 1 : 2;
  static constexpr int kDataWarps = 4, kWeightWarps = kOut / 16 * (kIn / 8 / kFragments);
  static constexpr int kConsumers = (kDataWarps + kWeightWarps) * kWarp, kProducers = 4 * kWarp;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kPixels = kDataWarps * 16 * kStack;
  // Whether it runs only with memory for two stages. Otherwise it takes one if two do not fit.
  static constexpr bool kAlwaysTwo = kPixels == 256;
  // Enough for the bordered patch of one image of 16 x 16 in 256 slots, two of 8 x 8 in 128 slots,
  // or halves of two such images in 64 slots.
  static constexpr int kBordered = kPixels == 256 ? 336 : kPixels == 128 ? 200 : 120;
  static constexpr int kOutLd = padded<T>(kOut), kInLd = padded<T>(kIn);
  static constexpr int kStageSize = 2 * kBordered * kOutLd + kPixels * kInLd;
  static constexpr int kTapSize = tap_size<T>(kOut * kInLd);
  using OutVector = UnitVector<T, kOut>;
  static constexpr int kVectors = 2 * OutVector::kSize + 3 * kIn;
  // Whether data warps keep their sums in registers. For large patches there are too few.
  static constexpr bool kKeepsSums = kStack < 4;
  static constexpr int kLaneSums = kKeepsSums ? 0 : kIn / 8 * 4 * kWarp;  // of a warp
  using Places = dense_ext::Places<kPixels, kBordered, kThreads, kProducers>;

  static constexpr int shared_bytes(int stages) {
    return SharedMemory::bytes_of(stages * kStageSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kTaps * kTapSize * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kVectors * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(Places::kInts * int64_t{sizeof(int)}) +
           SharedMemory::bytes_of(2 * kPixels * int64_t{sizeof(T)}) +
           SharedMemory::bytes_of(kDataWarps * 2 * kIn * int64_t{sizeof(float)}) +
           SharedMemory::bytes_of(kDataWarps * kLaneSums * int64_t{sizeof(float)});
  }
};

// The phases of a block, and what they share.
template <class Config>
struct BackwardBlock {
  using Math = typename Config::Math;
  using T = typename Config::T;
  using OutVector = typename Config::OutVector;
  static constexpr int kConsumers = Config::kConsumers, kProducers = Config::kProducers;
  static constexpr int kThreads = Config::kThreads, kPixels = Config::kPixels;
  static constexpr int kOut = Config::kOut, kIn = Config::kIn, kBordered = Config::kBordered;
  static constexpr int kOutLd = Config::kOutLd, kInLd = Config::kInLd;
  static constexpr bool kWide = Config::kWide;
  static constexpr int kRows = 16 * Config::kStack, kColumns = kIn / 8;  // da of a warp
  using DataGradient = float[Config::kStack][kColumns][4];
  static constexpr int kFragments = Config::kFragments;
  using WeightGradient = float[kTaps][1][kFragments][4];
  // A lane's sums of g and of g * (z - mean) over its columns of da.
  struct Sums {
    float g[kColumns][2], gz[kColumns][2];
  };
  using Barriers = StageBarriers<kThreads, 2>;
  enum { kAmongProducers = Barriers::kOwn, kAmongConsumers };

  // A patch in shared memory. dy replaces grad, and grad_bn replaces y.
  struct Stage {
    T *dy, *y;  // [kBordered][kOut]
    T* z;       // [kPixels][kIn]
    T* grad_bn;
    __device__ explicit Stage(T* begin)
        : dy(begin), y(dy + kBordered * kOutLd), z(y + kBordered * kOutLd), grad_bn(y) {
      static_assert(kPixels * kInLd <= kBordered * kOutLd);
    }
  };

  const BackwardArguments<T>& args;
  const Patches& patches;
  T *const stages, *const weights;  // weights: [kTaps][kOut][kIn]
  float* const u;
  const typename Config::Places places;
  BitsOf<T>* const keep;  // [2][kPixels]: for each slot all ones if it has a pixel, else zero
  float *const sums, *const lane_sums;
  const int first_in;
  const int out, ins;  // ins: the block's channels of z

  __device__ BackwardBlock(const BackwardArguments<T>& args, SharedMemory shared)
      : args(args),
        patches(args.patches),
        stages(shared.take<T>(args.stages * Config::kStageSize)),
        weights(shared.take<T>(kTaps * Config::kTapSize)),
        u(shared.take<float>(Config::kVectors)),
        places(shared.take<int>(Config::Places::kInts), args.patches),
        keep(shared.take<BitsOf<T>>(2 * kPixels)),
        sums(shared.take<float>(Config::kDataWarps * 2 * kIn)),
        lane_sums(shared.take<float>(Config::kDataWarps * Config::kLaneSums)),
        first_in(block_x() * kIn),
        out(static_cast<int>(args.y.channels)),
        ins(static_cast<int>(std::min(int64_t{kIn}, args.z.channels - first_in))) {}

  __device__ void run() {
    sync_threads();  // all slots' positions are known
    if (thread_index() >= kConsumers) {
      produce();
    } else {
      load_weight();
      if (warp_index() < Config::kDataWarps) {
        compute_data_gradient();
      } else {
        compute_weight_gradient();
      }
    }
    sync_threads();
    float* row = args.rows + block_y() * args.row_size + first_in;
    add_column_sums<kThreads, Config::kDataWarps, kIn>(sums, ins, row, row + args.z.channels);
  }

  // A step is a patch. Its stage is step % stage_count(), and its parity step % 2.
  __device__ int steps() const { return (patches.count - block_y() + grid_y() - 1) / grid_y(); }
  __device__ int stage_count() const { return Config::kAlwaysTwo ? 2 : args.stages; }
  __device__ Stage stage_of(int step) const {
    return Stage(stages + step % stage_count() * Config::kStageSize);
  }

  // --- producers -------------------------------------------------------------------------------

  __device__ void produce() const {
    copy_vector<kOut, kProducers>(u, args.u, 0, out, OutVector::place, producer());
    copy_vector<kOut, kProducers>(v(), args.v, 0, out, OutVector::place, producer());
    const int count = steps();
    for (int step = 0; step < count; step++) {
      const int stage = step % stage_count(), parity = step % 2;
      if (step >= stage_count()) Barriers::wait_until_empty(stage);
      places.locate(block_y() + step * grid_y(), parity, producer());
      sync_named<kProducers>(kAmongProducers);
      const Stage to = stage_of(step);
      load(to, parity);
      copy_async_commit();
      mark_slots(parity);
      copy_async_wait<0>();
      // A producer forms dy where it has loaded grad and y itself. The vectors are others'.
      if (!kWide || step == 0) sync_named<kProducers>(kAmongProducers);
      form_dy(to, parity);
      Barriers::filled(stage);
    }
  }

  __device__ __forceinline__ void load(const Stage& to, int parity) const {
    const auto row_of = [&](const Pixels<const T>& of) {
      return ChosenRows(Rows(of, places.origin(parity), 0, 0),
                        [&](int p) { return places.source(parity, p); });
    };
    copy_tile<kBordered, kOut, kProducers, kWide>(to.dy, kOutLd, out, args.grad_bytes,
                                                  row_of(args.grad), producer());
    copy_tile<kBordered, kOut, kProducers, kWide>(to.y, kOutLd, out, args.y_bytes, row_of(args.y),
                                                  producer());
    copy_tile<kPixels, kIn, kProducers, kWide>(
        to.z, kInLd, ins, args.z_bytes,
        ChosenRows(Rows(args.z, places.origin(parity), 0, first_in),
                   [&](int r) { return places.center(parity, r); }),
        producer());
  }

  // Fills `keep`.
  __device__ __forceinline__ void mark_slots(int parity) const {
    for (int r = producer(); r < kPixels; r += kProducers) {
      const bool used = places.center(parity, r) >= 0;
      store_shared(keep + parity * kPixels + r, used ? static_cast<BitsOf<T>>(~0u) : BitsOf<T>{0});
    }
  }

  // Forms dy in place of grad. Outside the images it stays zero, where v would remain otherwise.
  __device__ __forceinline__ void form_dy(const Stage& at, int parity) const {
    const Units<T, kOut, kProducers> units(producer());
    units.for_columns([&](int c, int) {
      float us[OutVector::kElements], vs[OutVector::kElements];
      OutVector::load(us, u, c);
      OutVector::load(vs, v(), c);
      constexpr int kBatch = 4;
      Bytes<16> grad[kBatch], y[kBatch];
      bool inside[kBatch];
      units.template for_batches<kBordered, kBatch>(
          [&](int p, int n) {
            grad[n] = load_shared(unit_at(at.dy + p * kOutLd + c));
            y[n] = load_shared(unit_at(at.y + p * kOutLd + c));
            inside[n] = places.source(parity, p) >= 0;
          },
          [&](int p, int n) {
            Vector<T, 16> dy(grad[n]);
            const Vector<T, 16> of(y[n]);
            DENSE_EXT_UNROLL for (int e = 0; e < OutVector::kElements; e++) {
              dy.value[e] += us[e] * of.value[e] + vs[e];
            }
            if (inside[n]) store_shared(unit_at(at.dy + p * kOutLd + c), dy.stored());
          });
    });
  }

  // --- consumers -------------------------------------------------------------------------------

  // Loads W, and the vectors of z's channels.
  __device__ __forceinline__ void load_weight() const {
    copy_vector<kIn, kConsumers>(mean(), args.mean, first_in, args.z.channels);
    copy_vector<kIn, kConsumers>(scale(), args.scale, first_in, args.z.channels);
    copy_vector<kIn, kConsumers>(shift(), args.shift, first_in, args.z.channels);
    load_taps<kOut, kIn, kConsumers>(weights, kInLd, args.weight, args.weight_bytes, 0, first_in);
    copy_async_commit();
    copy_async_wait<0>();
    sync_named<kConsumers>(kAmongConsumers);
  }

  // Calls body(stage, parity) for each patch when it is ready.
  template <class Body>
  __device__ __forceinline__ void for_patches(const Body& body) const {
    const int count = steps();
    DENSE_EXT_NO_UNROLL for (int step = 0; step < count; step++) {
      const int stage = step % stage_count();
      Barriers::wait_until_full(stage);
      body(stage_of(step), step % 2);
      if (step + stage_count() < count) Barriers::emptied(stage);
    }
  }

  // The weight warps: bn_relu_conv3x3_weight_gradient.cuh.
  __device__ void compute_weight_gradient() const;
  __device__ void add_weight_gradient(WeightGradient& dw, const Stage& at,
                                      const BitsOf<T>* used) const;
  __device__ void write_weight_gradient(const WeightGradient& dw) const;

  __device__ void compute_data_gradient() const {
    Sums total = {};
    if (!Config::kKeepsSums) for_fragments([&](int j) { store_sums(total, j); });
    const auto find_rows = [&] {
      return RowFragment<T>([&](int r) { return patches.corner(data_row() + r) * kOutLd; });
    };
    // Wide kernels find the rows again for every patch: there are no registers to keep them.
    const RowFragment<T> kept = find_rows();
    for_patches([&](const Stage& at, int parity) {
      const RowFragment<T> rows = kWide ? find_rows() : kept;
      DataGradient da = {};
      multiply_data(da, rows, at);
      form_grad_bn(da, at, keep + parity * kPixels, total);
      sync_warp();
      store(at, parity);
    });
    if (!Config::kKeepsSums) for_fragments([&](int j) { load_sums(total, j); });
    leave_column_sums<kIn>(sums, total.g, total.gz, warp_index(), 0);
  }

  template <class Body>
  __device__ __forceinline__ static void for_fragments(const Body& body) {
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) body(j);
  }
  // Load and store a lane's sums for a fragment of its warp.
  __device__ __forceinline__ void load_sums(Sums& total, int fragment) const {
    for_sums(total, fragment, [](float& sum, float* at) { sum = load_shared(at); });
  }
  __device__ __forceinline__ void store_sums(Sums& total, int fragment) const {
    for_sums(total, fragment, [](float& sum, float* at) { store_shared(at, sum); });
  }
  template <class Body>
  __device__ __forceinline__ void for_sums(Sums& total, int fragment, const Body& body) const {
    float* const at =
        lane_sums + warp_index() * Config::kLaneSums + 4 * fragment * kWarp + lane_index();
    DENSE_EXT_UNROLL for (int e = 0; e < 2; e++) {
      body(total.g[fragment][e], at + e * kWarp);
      body(total.gz[fragment][e], at + (2 + e) * kWarp);
    }
  }

  // The transposed convolution of dy: the taps in reverse order.
  __device__ __forceinline__ void multiply_data(DataGradient& da, const RowFragment<T>& rows,
                                                const Stage& at) const {
    const TransposedColumnFragments<T> columns(kInLd);
    const auto load_tap = [&](uint32_t (&b)[2][2], int tap, int k, int j) {
      const T* of_tap = weights + (kTaps - 1 - tap) * Config::kTapSize;
      columns.load(b[0], b[1], of_tap + k * kInLd + 8 * j, kInLd);
    };
    constexpr bool kFewRegisters = sizeof(T) == 4 || !Config::kKeepsSums;
    const int depth = kOut > 32 ? out : kOut;  // for example 48 of 64: worth a branch
    multiply_taps<Math, kOut, kFewRegisters>(da, rows, at.dy, kOutLd, patches.line, depth,
                                             load_tap);
  }

  // Forms the warp's part of grad_bn, and adds to the sums.
  __device__ __forceinline__ void form_grad_bn(const DataGradient& da, const Stage& at,
                                               const BitsOf<T>* used, Sums& total) const {
    const Position lane;
    DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j++) {
      if (!Config::kKeepsSums) load_sums(total, j);
      const int column = 8 * j + lane.column;
      const Float2 s = load_pair(scale() + column), t = load_pair(shift() + column);
      const Float2 m = load_pair(mean() + column);
      DENSE_EXT_UNROLL for (int i = 0; i < 2 * Config::kStack; i++) {
        const int r = data_row() + 8 * i + lane.row;
        if (!load_shared(used + r)) continue;
        const int place = r * kInLd + column;
        const Float2 z = load_pair(at.z + place);
        const float* g = da[i / 2][j] + i % 2 * 2;
        const float gx = z.x * s.x + t.x <= 0 ? 0.0f : g[0];
        const float gy = z.y * s.y + t.y <= 0 ? 0.0f : g[1];
        total.g[j][0] += gx;
        total.g[j][1] += gy;
        total.gz[j][0] += gx * (z.x - m.x);
        total.gz[j][1] += gy * (z.y - m.y);
        store_pair(at.grad_bn + place, gx, gy);
      }
      sync_warp();  // the lanes that skipped slots are ahead
      if (!Config::kKeepsSums) store_sums(total, j);
    }
  }

  // Stores the warp's part of grad_bn, or adds it to what earlier pieces of K have stored.
  __device__ __forceinline__ void store(const Stage& at, int parity) const {
    T* const part = at.grad_bn + data_row() * kInLd;
    const ChosenRows row_of(Rows(args.grad_bn, places.origin(parity), 0, first_in),
                            [&](int r) { return places.center(parity, data_row() + r); });
    if (args.accumulate) {
      for (int i = lane_index(); i < kRows * kIn; i += kWarp) {
        const Row<T> before = row_of(i / kIn);
        if (!before.exists || i % kIn >= ins) continue;
        T* to = part + i / kIn * kInLd + i % kIn;
        store_shared(to, from_float<T>(to_float(load_shared(to)) +
                                       to_float(load_global(before.data + i % kIn))));
      }
      sync_warp();
    }
    store_tile<kRows, kIn, kWarp, kWide>(part, kInLd, ins, args.grad_bn_bytes, row_of,
                                         lane_index());
  }

  __device__ static int producer() { return thread_index() - kConsumers; }
  // A data warp's position in da, and a weight warp's in dW.
  __device__ static int data_row() { return warp_index() * kRows; }
  __device__ static int weight_row() {
    return (warp_index() - Config::kDataWarps) % (kOut / 16) * 16;
  }
  __device__ static int weight_column() {
    return (warp_index() - Config::kDataWarps) / (kOut / 16) * 8 * kFragments;
  }

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
