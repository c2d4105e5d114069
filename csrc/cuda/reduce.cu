// add_rows. A block takes 32 channels, or 32 elements of a weight gradient. Each of its warps adds
// every kWarps-th row; then the warps' results are added in a tree. A warp loads kBatch rows at a
// time, so that it waits for memory only once for them. Bytes moved: those of the rows.

#include "reduce.cuh"

namespace dense_ext {
namespace {

constexpr int kColumns = kWarp, kBatch = 4, kWarps = 8;

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
__global__ void __launch_bounds__(kWarps* kWarp) add_rows_kernel(const AddArguments<T> args) {
  SharedMemory shared;
  auto* parts = shared.take<Columns>(kWarps * kColumns);
  const int64_t of_channels = args.to.channels, blocks = ceil_div(of_channels, kColumns);
  const bool sums_channels = block_x() < blocks;
  const int64_t index =
      (block_x() - (sums_channels ? 0 : blocks)) * int64_t{kColumns} + lane_index();
  const int64_t column = sums_channels ? index : 2 * of_channels + index;
  const bool inside = sums_channels ? index < of_channels : column < args.size;
  Columns total;
  for (int64_t r = warp_index(); inside && r < args.row_count; r += kBatch * kWarps) {
    Columns found[kBatch];
    DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) {
      if (r + n * kWarps >= args.row_count) continue;
      const float* at = args.rows + (r + n * kWarps) * args.size + column;
      found[n] = {load_global(at), sums_channels ? load_global(at + of_channels) : 0};
    }
    DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) total.add(found[n]);
  }
  Columns* const part = parts + thread_index();
  *part = total;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    sync_threads();
    if (warp_index() < half) part->add(part[half * kColumns]);
  }
  total = *part;
  if (warp_index() > 0 || !inside) return;
  if (sums_channels) {
    store_channel(args.to, index, total);
  } else {
    store_element(args.to, index, total.first);
  }
}

}  // namespace

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to) {
  const int64_t weights = to.taps * to.weight.out * to.weight.in;
  const AddArguments<T> args{static_cast<const float*>(rows.data_ptr()), row_count,
                             2 * to.channels + weights, to};
  constexpr int kThreads = kWarps * kWarp;
  const int64_t blocks = ceil_div(to.channels, kColumns) + ceil_div(weights, kColumns);
  launch<add_rows_kernel<T>>(
      {blocks, 1, kThreads, SharedMemory::bytes_of(kThreads * sizeof(Columns))}, args);
}

template void add_rows(const Tensor&, int64_t, const Sums<float>&);
template void add_rows(const Tensor&, int64_t, const Sums<BFloat16>&);
template void add_rows(const Tensor&, int64_t, const Sums<Half>&);

}  // namespace dense_ext
