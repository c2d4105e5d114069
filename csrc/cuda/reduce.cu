// merge_moments and add_rows. A block takes 32 columns. Each of its warps combines every kGroups-th
// row; then the warps' results are combined in a tree. Bytes moved: those of the rows.

#include "reduce.cuh"
#include "tile.cuh"

namespace dense_ext {
namespace {

constexpr int kColumns = kWarp, kGroups = 8, kThreads = kColumns * kGroups;

struct MergeArguments {
  const float* rows;
  int64_t row_count, channels;
  float *mean, *var;
};

__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const MergeArguments args) {
  SharedMemory shared;
  auto* parts = shared.take<Moments>(kThreads);
  const int64_t channel = int64_t{block_x()} * kColumns + lane_index(),
                size = 1 + 2 * args.channels;
  Moments total;
  if (channel < args.channels) {
    for (int64_t r = warp_index(); r < args.row_count; r += kGroups) {
      const float* row = args.rows + r * size;
      total.merge({load_global(row), load_global(row + 1 + channel),
                   load_global(row + 1 + args.channels + channel)});
    }
  }
  parts[thread_index()] = total;
  for (int half = kGroups / 2; half > 0; half /= 2) {
    sync_threads();
    if (warp_index() < half) parts[thread_index()].merge(parts[thread_index() + half * kColumns]);
  }
  if (warp_index() == 0 && channel < args.channels) {
    total = parts[thread_index()];
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
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const AddArguments<T> args) {
  SharedMemory shared;
  auto* parts = shared.take<float>(kThreads);
  const int64_t column = int64_t{block_x()} * kColumns + lane_index();
  float total = 0;
  if (column < args.size) {
    for (int64_t r = warp_index(); r < args.row_count; r += kGroups) {
      total += load_global(args.rows + r * args.size + column);
    }
  }
  parts[thread_index()] = total;
  for (int half = kGroups / 2; half > 0; half /= 2) {
    sync_threads();
    if (warp_index() < half) parts[thread_index()] += parts[thread_index() + half * kColumns];
  }
  if (warp_index() > 0 || column >= args.size) return;
  total = parts[thread_index()];
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
  launch<merge_moments_kernel>({ceil_div(channels, kColumns), 1, kThreads,
                                SharedMemory::bytes_of(kThreads * sizeof(Moments))},
                               args);
}

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to) {
  const int64_t weights = to.taps * to.weight.out * to.weight.in;
  const AddArguments<T> args{static_cast<const float*>(rows.data_ptr()), row_count,
                             to.vector_size + weights, to};
  launch<add_rows_kernel<T>>({ceil_div(args.size, kColumns), 1, kThreads,
                              SharedMemory::bytes_of(kThreads * sizeof(float))},
                             args);
}

template void add_rows(const Tensor&, int64_t, const Sums<float>&);
template void add_rows(const Tensor&, int64_t, const Sums<BFloat16>&);
template void add_rows(const Tensor&, int64_t, const Sums<Half>&);

}  // namespace dense_ext
