// Strips of an image whose lines pass through shared memory, and the maximum windows in them.

#pragma once

#include "reduce.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace dense_ext {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kBlocks = 4;  // per multiprocessor
constexpr int kLines = 14, kColumns = 14;  // the maximum windows of a strip
constexpr int kAhead = 2, kStages = kAhead + 2;

// A warp takes as many channels of a pixel as fill 128 bytes; each thread takes four bytes of them.
constexpr int kWordBytes = 4;
template <class T>
using Word = Vector<T, kWordBytes>;
template <class T>
constexpr int kChannels = kWarp * Word<T>::kSize;

template <class T>
__device__ __forceinline__ Word<T> load_word(const T* pixel) {
  const T* word = pixel + lane_index() * Word<T>::kSize;
  return Word<T>(load_shared(reinterpret_cast<const Bytes<kWordBytes>*>(word)));
}

// The channels of a block and of a thread, and access to the thread's part of per-channel vectors.
template <class T>
struct Channels {
  int64_t chunk, first;
  int chunk_size, size;  // size is zero or negative beyond the last channel

  __device__ explicit Channels(int64_t channels)
      : chunk(int64_t{block_x()} * kChannels<T>),
        first(chunk + lane_index() * Word<T>::kSize),
        chunk_size(static_cast<int>(std::min<int64_t>(kChannels<T>, channels - chunk))),
        size(std::min(int{Word<T>::kSize}, chunk_size - lane_index() * Word<T>::kSize)) {}

  __device__ Word<T> load(const float* vector) const {
    Word<T> word;
    DENSE_EXT_UNROLL for (int i = 0; i < Word<T>::kSize; i++) {
      if (i < size) word.value[i] = load_global(vector + first + i);
    }
    return word;
  }

  // Stores a word of a pixel; if words are not aligned, it stores their elements one by one.
  __device__ void store(T* pixel, const Word<T>& word, int bytes) const {
    if (size <= 0) return;
    if (bytes >= kWordBytes) return store_bytes(pixel + first, word.stored());
    DENSE_EXT_UNROLL for (int i = 0; i < Word<T>::kSize; i++) {
      if (i < size) store_global(pixel + first + i, from_float<T>(word.value[i]));
    }
  }
};

// Splits the windows of y into near-equal strips; counts them down and across an image.
struct Strips {
  int64_t down, across;

  template <class T>
  explicit Strips(const Pixels<T>& y)
      : down(ceil_div(y.height, kLines)), across(ceil_div(y.width, kColumns)) {}

  DENSE_EXT_HOST_DEVICE int64_t count(int64_t images) const { return images * down * across; }
};

struct Strip {
  int64_t image;
  Range lines, columns;

  template <class T>
  __device__ Strip(const Pixels<T>& y, const Strips& strips, int64_t index)
      : image(index / (strips.down * strips.across)),
        lines(part_of(y.height, strips.down, index / strips.across % strips.down)),
        columns(part_of(y.width, strips.across, index % strips.across)) {}
};

// The maximum of a window's ReLU values: that of the values before the ReLU, but at least zero.
template <class T>
struct Maximum {
  static constexpr int kNone = 9;
  Word<T> value;
  int index[Word<T>::kSize];  // 3*line + column of the first maximum; kNone if none is positive

  // Takes three lines of pixels, and which of the lines and columns are inside the image.
  __device__ Maximum(const T* const (&lines)[3], const bool (&line_inside)[3],
                     const bool (&column_inside)[3], const Word<T>& scale, const Word<T>& shift) {
    DENSE_EXT_UNROLL for (int i = 0; i < Word<T>::kSize; i++) index[i] = kNone;
    DENSE_EXT_UNROLL for (int number = 0; number < 9; number++) {
      const int line = number / 3, column = number % 3;
      if (!line_inside[line] || !column_inside[column]) continue;
      const Word<T> x = load_word(lines[line] + column * kChannels<T>);
      DENSE_EXT_UNROLL for (int i = 0; i < Word<T>::kSize; i++) {
        const float a = scale.value[i] * x.value[i] + shift.value[i];
        const bool wins = a > value.value[i] || a != a;  // NaN is a maximum, as in PyTorch
        value.value[i] = wins ? a : value.value[i];
        index[i] = wins ? number : index[i];
      }
    }
  }
};

// Moves a strip, with kHalo more windows on its right and below, through shared memory line by
// line. There a ring of stages holds two lines of x each. Lines of windows are counted from the
// strip's first. For the windows of line l, the upper pixels are in the second line of stage l; the
// middle and lower pixels are in the two lines of stage l + 1. If kHalo is 1, each stage has a
// third line after the pixels, for the windows' own elements; stage l + 1 holds those of line l.
template <class T, int kHalo>
struct Ring {
  static constexpr int kWindows = kColumns + kHalo, kPixels = 2 * kWindows + 1;
  static constexpr int kStageSize = (2 * kPixels + kHalo * kWindows) * kChannels<T>;
  static constexpr int kSize = kStages * kStageSize;

  T* stages;
  const Pixels<const T>& x;
  int bytes;  // per access to x
  const Channels<T>& channels;
  Word<T> scale, shift;

  __device__ T* stage(int i) const { return stages + i % kStages * kStageSize; }
  // Column c is counted from the left column of the strip's first window.
  __device__ T* pixel(int i, int line, int c) const {
    return stage(i) + (line * kPixels + c) * kChannels<T>;
  }
  __device__ T* windows(int i) const { return pixel(i, 2, 0); }

  // Calls body(l) for each line of windows when its pixels have arrived. Calls load_windows(l)
  // earlier, to start copying the windows' own elements.
  template <class Load, class Body>
  __device__ void for_lines(const Strip& strip, const Load& load_windows, const Body& body) const {
    const int lines = static_cast<int>(strip.lines.size()) + kHalo;
    const auto load = [&](int i) {
      if (i <= lines) {
        load_pixels(strip, i);
        if (i > 0) load_windows(i - 1);
      }
      copy_async_commit();
    };
    for (int i = 0; i <= kAhead; i++) load(i);
    for (int l = 0; l < lines; l++) {
      copy_async_wait<kAhead - 1>();
      sync_threads();
      load(l + 1 + kAhead);
      body(l);
    }
    sync_threads();
  }

  // Calls body(j, maximum) for the warp's windows of line l.
  template <class Body>
  __device__ void for_windows(const Strip& strip, int l, const Body& body) const {
    const int64_t line = strip.lines.begin + l;
    const bool line_inside[3] = {line > 0, true, 2 * line + 1 < x.height};
    for (int j = warp_index(); j < strip.columns.size() + kHalo; j += kWarps) {
      const int64_t column = strip.columns.begin + j;
      const bool column_inside[3] = {column > 0, true, 2 * column + 1 < x.width};
      const T* const pixels[3] = {pixel(l, 1, 2 * j), pixel(l + 1, 0, 2 * j),
                                  pixel(l + 1, 1, 2 * j)};
      body(j, Maximum<T>(pixels, line_inside, column_inside, scale, shift));
    }
  }

 private:
  __device__ void load_pixels(const Strip& strip, int i) const {
    const int64_t first_line = 2 * (strip.lines.begin + i - 1);
    const int64_t first_column = 2 * strip.columns.begin - 1;
    const int columns = 2 * (static_cast<int>(strip.columns.size()) + kHalo) + 1;
    copy_tile<2 * kPixels, kChannels<T>, kThreads, false>(
        stage(i), kChannels<T>, channels.chunk_size, bytes, [&](int r) {
          const int64_t h = first_line + r / kPixels, w = first_column + r % kPixels;
          const bool needed = r % kPixels < columns && (i > 0 || r >= kPixels);
          const bool inside = h >= 0 && h < x.height && w >= 0 && w < x.width;
          return Row<const T>{x.at((strip.image * x.height + h) * x.width + w) + channels.chunk,
                              needed && inside};
        });
  }
};

}  // namespace
}  // namespace dense_ext
