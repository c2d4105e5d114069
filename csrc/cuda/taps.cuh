// The nine taps of a 3x3 convolution: loading their weight, and a warp's products over them.

#pragma once

#include "patch.cuh"
#include "product.cuh"

namespace dense_ext {

constexpr int kTaps = 9;

// The distance between two taps of the weight in shared memory, in elements. Padding puts
// neighbouring taps, which neighbouring threads write, into different banks.
template <class T>
constexpr int tap_size(int elements) {
  return padded<T>(elements);
}

// The bytes that an access to the weight may move: 16 if the channels of every tap are contiguous
// and aligned, as in channels_last memory, else one element.
template <class T>
int tap_bytes(const Weight<const T>& weight) {
  const AccessBytes bytes = AccessBytes()
                                .add(weight.data, weight.in, weight.out_stride)
                                .add(weight.data, weight.in, weight.row_stride)
                                .add(weight.data, weight.in, weight.column_stride);
  return weight.in_stride == 1 && bytes == 16 ? 16 : static_cast<int>(sizeof(T));
}

// Copies W[first_out.., first_in.., tap] to shared memory as [tap][kOut][kIn], with zeros beyond
// its ends; in accesses of 16 bytes asynchronously. Single elements are loaded in batches, so that
// a thread waits for memory only once a batch.
template <int kOut, int kIn, int kThreads, class T>
__device__ __forceinline__ void load_taps(T* to, int ld, const Weight<const T>& weight, int bytes,
                                          int64_t first_out, int64_t first_in,
                                          int thread = thread_index()) {
  // Calls body(element in shared memory, element in global memory, valid).
  const auto locate = [&](int tap, int out, int in, const auto& body) {
    const int64_t o = first_out + out, c = first_in + in;
    body(to + tap * tap_size<T>(kOut * ld) + out * ld + in,
         weight.data + o * weight.out_stride + c * weight.in_stride + weight.tap_offset(tap),
         o < weight.out && c < weight.in);
  };
  if (bytes == 16) {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kUnits = kIn / kElements;
    DENSE_EXT_NO_UNROLL for (int i = thread; i < kTaps * kOut * kUnits; i += kThreads) {
      locate(i / kUnits / kOut, i / kUnits % kOut, i % kUnits * kElements,
             [](T* at, const T* from, bool valid) { copy_async<16>(at, from, valid); });
    }
    return;
  }
  constexpr int kBatch = 8, kElements = kTaps * kOut * kIn;
  // Consecutive threads read consecutive elements of a contiguous weight.
  DENSE_EXT_NO_UNROLL for (int i = thread; i < kElements; i += kBatch * kThreads) {
    T values[kBatch];
    const auto each = [&](const auto& body) {
      DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) {
        const int element = i + n * kThreads;
        if (element >= kElements) break;
        locate(element % kTaps, element / kTaps / kIn, element / kTaps % kIn,
               [&](T* at, const T* from, bool valid) { body(values[n], at, from, valid); });
      }
    };
    each([](T& value, T*, const T* from, bool valid) { value = valid ? load_global(from) : T{0}; });
    each([](const T& value, T* at, const T*, bool) { store_shared(at, value); });
  }
}

// c += the nine products for a stack of lines of 16 pixels, over the first `depth` of kDepth
// channels. Line i of c uses lines i to i + 2 of a, each at three columns. The offsets of `rows`
// are relative to `tile`, whose lines have `line` rows of `ld` elements. `load_tap(b, t, k, j)`
// loads two fragments, with the columns from 8 j on, of the weight for line t / 3 and column t % 3.
// With kFewRegisters, addresses are computed again where they are used.
template <class Math, int kDepth, bool kFewRegisters, class T, int kStack, int kColumns,
          class LoadTap>
__device__ __forceinline__ void multiply_taps(float (&c)[kStack][kColumns][4],
                                              const RowFragment<T>& rows, const T* tile, int ld,
                                              int line, int depth, const LoadTap& load_tap) {
  if constexpr (sizeof(T) == 2) tile = in_register(tile);
  DENSE_EXT_NO_UNROLL for (int dx = 0; dx < 3; dx++) {
    const auto add = [&](int k) {
      uint32_t a[kStack + 2][4];
      DENSE_EXT_UNROLL for (int l = 0; l < kStack + 2; l++) {
        const int distance = l * (kFewRegisters ? in_register(line) : line) + dx;
        rows.load(a[l], tile + distance * ld + k);
      }
      DENSE_EXT_UNROLL for (int dy = 0; dy < 3; dy++) {
        DENSE_EXT_UNROLL for (int j = 0; j < kColumns; j += 2) {
          uint32_t b[2][2];
          load_tap(b, 3 * dy + dx, k, j);
          multiply<Math>(c, a, b, j, dy);
        }
      }
    };
    if constexpr (!kFewRegisters) {
      DENSE_EXT_UNROLL for (int k = 0; k < kDepth; k += Math::kDepth) {
        if (k >= depth) break;
        add(k);
      }
    } else {
      DENSE_EXT_NO_UNROLL for (int k = 0; k < depth; k += Math::kDepth) add(k);
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

}  // namespace dense_ext
