// merge_moments and add_rows. A block takes 32 columns. Each of its warps combines every kWarps-th
// row; then the warps' results are combined in a tree. A warp loads kBatch rows at a time, so that
// it waits for memory only once for them. Bytes moved: those of the rows.

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
};

__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_moments_kernel(const MergeArguments args) {
  SharedMemory shared;
  auto* parts = shared.take<Moments>(kMergeWarps * kColumns);
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
  if (warp_index() == 0 && channel < args.channels) {
    store_global(args.mean + channel, total.mean);
    store_global(args.var + channel, total.m2 / total.count);
  }
}

template <class T>
struct AddArguments {
  const float* rows;
  int64_t row_count, size;
  Sums<T> to;
};

template <class T>
__global__ void __launch_bounds__(kAddWarps* kWarp) add_rows_kernel(const AddArguments<T> args) {
  SharedMemory shared;
  auto* parts = shared.take<float>(kAddWarps * kColumns);
  const int64_t column = int64_t{block_x()} * kColumns + lane_index();
  float total = 0;
  if (column < args.size) {
    float found[kBatch];
    for_rows<kAddWarps>(
        args.row_count,
        [&](int n, int64_t r) {
          found[n] = r < 0 ? 0 : load_global(args.rows + r * args.size + column);
        },
        [&](int n) { total += found[n]; });
  }
  total = combine_warps<kAddWarps>(parts, total, [](float& a, float b) { a += b; });
  if (warp_index() > 0 || column >= args.size) return;
  const Sums<T>& to = args.to;
  if (column < to.vector_size) {
    float* at = to.vector + column;
    store_global(at, to.accumulate ? load_global(at) + total : total);
    return;
  }
  const int64_t element = column - to.vector_size, in = element % to.weight.in;
  const int64_t out = element / to.weight.in % to.weight.out;
  const int64_t tap = element / to.weight.in / to.weight.out;
  store_global(to.weight.data + out * to.weight.out_stride + in * to.weight.in_stride +
                   to.weight.tap_offset(tap),
               from_float<T>(total));
}

}  // namespace

void merge_moments(const Tensor& rows, int64_t row_count, int64_t channels, float* mean,
                   float* var) {
  const MergeArguments args{static_cast<const float*>(rows.data_ptr()), row_count, channels, mean,
                            var};
  constexpr int kThreads = kMergeWarps * kWarp;
  launch<merge_moments_kernel>({ceil_div(channels, kColumns), 1, kThreads,
                                SharedMemory::bytes_of(kThreads * sizeof(Moments))},
                               args);
}

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to) {
  const int64_t weights = to.taps * to.weight.out * to.weight.in;
  const AddArguments<T> args{static_cast<const float*>(rows.data_ptr()), row_count,
                             to.vector_size + weights, to};
  constexpr int kThreads = kAddWarps * kWarp;
  launch<add_rows_kernel<T>>({ceil_div(args.size, kColumns), 1, kThreads,
                              SharedMemory::bytes_of(kThreads * sizeof(float))},
                             args);
}

template void add_rows(const Tensor&, int64_t, const Sums<float>&);
template void add_rows(const Tensor&, int64_t, const Sums<BFloat16>&);
template void add_rows(const Tensor&, int64_t, const Sums<Half>&);

}  // namespace dense_ext
