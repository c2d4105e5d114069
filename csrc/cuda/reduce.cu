// merge_moments and add_rows. A block takes 32 channels, or 32 elements of a weight gradient. Each
// of its warps combines every kWarps-th row; then the warps' results are combined in a tree. A warp
// loads kBatch rows at a time, so that it waits for memory only once for them. Bytes moved: those
// of the rows.

#include "moments.cuh"
#include "reduce.cuh"

namespace dense_ext {
namespace {

constexpr int kColumns = kWarp, kBatch = 4;
constexpr int kMergeWarps = 32;  // one block merges the moments of 32 channels: it is to be fast
constexpr int kAddWarps = 8;

// Combines the results of a block's warps, `parts` [kWarps][kColumns], in a tree; warp 0 has the
// total.
template <int kWarps, class Part, class Combine>
__device__ __forceinline__ Part combine_warps(Part* parts, const Part& part,
                                              const Combine& combine) {
  parts[thread_index()] = part;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    sync_threads();
    if (warp_index() < half) {
      combine(parts[thread_index()], parts[thread_index() + half * kColumns]);
    }
  }
  return parts[thread_index()];
}

// Calls load(n, row) for each n below kBatch, then combine(n) for each, until all rows of the
// calling warp are done. A row past the end is -1.
template <int kWarps, class Load, class Combine>
__device__ __forceinline__ void for_rows(int64_t row_count, const Load& load,
                                         const Combine& combine) {
  for (int64_t first = warp_index(); first < row_count; first += kBatch * kWarps) {
    DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) {
      const int64_t row = first + n * kWarps;
      load(n, row < row_count ? row : -1);
    }
    DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) combine(n);
  }
}

struct MergeArguments {
  const float* rows;
  int64_t row_count, channels;
  float *mean, *var;
  ScaleShift next;
};

// The blocks beyond those that merge take the channels of the next norm that are known.
__device__ __forceinline__ void bind_known_channels(const MergeArguments& args, int64_t block) {
  const int64_t c = block * (kMergeWarps * kWarp) + thread_index();
  if (c >= args.next.channels - args.channels) return;
  args.next.run(c, load_global(args.next.mean + c), load_global(args.next.var + c));
}

__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_moments_kernel(const MergeArguments args) {
  SharedMemory shared;
  auto* parts = shared.take<Moments>(kMergeWarps * kColumns);
  const int64_t merging = ceil_div(args.channels, kColumns);
  if (block_x() >= merging) return bind_known_channels(args, block_x() - merging);
  const int64_t channel = int64_t{block_x()} * kColumns + lane_index(),
                size = 1 + 2 * args.channels;
  Moments total;
  if (channel < args.channels) {
    Moments found[kBatch];
    for_rows<kMergeWarps>(
        args.row_count,
        [&](int n, int64_t r) {
          found[n] = {};
          if (r < 0) return;
          const float* row = args.rows + r * size;
          found[n] = {load_global(row), load_global(row + 1 + channel),
                      load_global(row + 1 + args.channels + channel)};
        },
        [&](int n) { total.merge(found[n]); });
  }
  total =
      combine_warps<kMergeWarps>(parts, total, [](Moments& a, const Moments& b) { a.merge(b); });
  if (warp_index() > 0 || channel >= args.channels) return;
  const float var = total.m2 / total.count;
  store_global(args.mean + channel, total.mean);
  store_global(args.var + channel, var);
  if (args.next.scale) {
    args.next.run(args.next.channels - args.channels + channel, total.mean, var);
  }
}

template <class T>
struct AddArguments {
  const float* rows;
  int64_t row_count, size;
  Sums<T> to;
};

// The sums of a column, or of a channel's two columns.
struct Columns {
  float first = 0, second = 0;

  __device__ void add(const Columns& other) {
    first += other.first;
    second += other.second;
  }
};

template <class T>
__device__ __forceinline__ void store_channel(const Sums<T>& to, int64_t channel, Columns total) {
  float *const first = to.vector + channel, *const second = first + to.channels;
  if (to.accumulate) total.add({load_global(first), load_global(second)});
  store_global(first, total.first);
  store_global(second, total.second);
  if (to.norm.grad_weight) to.norm.run(channel, total.first, total.second);
}

template <class T>
__device__ __forceinline__ void store_element(const Sums<T>& to, int64_t element, float total) {
  const int64_t in = element % to.weight.in, out = element / to.weight.in % to.weight.out;
  const int64_t tap = element / to.weight.in / to.weight.out;
  store_global(to.weight.data + out * to.weight.out_stride + in * to.weight.in_stride +
                   to.weight.tap_offset(tap),
               from_float<T>(total));
}

template <class T>
__global__ void __launch_bounds__(kAddWarps* kWarp) add_rows_kernel(const AddArguments<T> args) {
  SharedMemory shared;
  auto* parts = shared.take<Columns>(kAddWarps * kColumns);
  const int64_t of_channels = args.to.channels, blocks = ceil_div(of_channels, kColumns);
  const bool sums_channels = block_x() < blocks;
  const int64_t index =
      (block_x() - (sums_channels ? 0 : blocks)) * int64_t{kColumns} + lane_index();
  const int64_t column = sums_channels ? index : 2 * of_channels + index;
  const bool inside = sums_channels ? index < of_channels : column < args.size;
  Columns total;
  if (inside) {
    Columns found[kBatch];
    for_rows<kAddWarps>(
        args.row_count,
        [&](int n, int64_t r) {
          found[n] = {};
          if (r < 0) return;
          const float* at = args.rows + r * args.size + column;
          found[n] = {load_global(at), sums_channels ? load_global(at + of_channels) : 0};
        },
        [&](int n) { total.add(found[n]); });
  }
  total = combine_warps<kAddWarps>(parts, total, [](Columns& a, const Columns& b) { a.add(b); });
  if (warp_index() > 0 || !inside) return;
  if (sums_channels) {
    store_channel(args.to, index, total);
  } else {
    store_element(args.to, index, total.first);
  }
}

}  // namespace

void merge_moments(const Tensor& rows, int64_t row_count, int64_t channels, float* mean, float* var,
                   const ScaleShift& next) {
  const int64_t known = next.scale ? next.channels - channels : 0;
  STD_TORCH_CHECK(!next.scale || (known >= 0 && mean == next.mean + known),
                  "the next norm's last channels must be those whose moments are merged");
  const MergeArguments args{
      static_cast<const float*>(rows.data_ptr()), row_count, channels, mean, var, next};
  constexpr int kThreads = kMergeWarps * kWarp;
  const int64_t blocks = ceil_div(channels, kColumns) + ceil_div(known, kThreads);
  launch<merge_moments_kernel>(
      {blocks, 1, kThreads, SharedMemory::bytes_of(kThreads * sizeof(Moments))}, args);
}

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to) {
  const int64_t weights = to.taps * to.weight.out * to.weight.in;
  const AddArguments<T> args{static_cast<const float*>(rows.data_ptr()), row_count,
                             2 * to.channels + weights, to};
  constexpr int kThreads = kAddWarps * kWarp;
  const int64_t blocks = ceil_div(to.channels, kColumns) + ceil_div(weights, kColumns);
  launch<add_rows_kernel<T>>(
      {blocks, 1, kThreads, SharedMemory::bytes_of(kThreads * sizeof(Columns))}, args);
}

template void add_rows(const Tensor&, int64_t, const Sums<float>&);
template void add_rows(const Tensor&, int64_t, const Sums<BFloat16>&);
template void add_rows(const Tensor&, int64_t, const Sums<Half>&);

}  // namespace dense_ext
