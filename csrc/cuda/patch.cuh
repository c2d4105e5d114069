// Patches of images for 3x3 convolutions. A patch is a rectangle of pixels of one image or, if the
// images are small, of several images side by side. Each image has a border one pixel wide, which
// neighbouring images share.
//
// Products take a patch's pixels in slots. 16 slots side by side are the rows of one fragment. The
// next 16 slots are the pixels below, and so on for all lines; then come the next 16 columns. So
// the fragment shifted down by one line is the next fragment, and fragments are read once for
// several lines. These lines form a stack; `lines` is a multiple of a stack's height. Slots past
// the patch read arbitrary data; their products are discarded.

#pragma once

#include <utility>

#include "tensor.cuh"

namespace dense_ext {

// Divides numbers from 0 to 2^31 - 1 by a number that the host knows, as a multiplication.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int divisor) {
    while ((int64_t{1} << shift_) < divisor) shift_++;
    multiplier_ = static_cast<uint32_t>(ceil_div(int64_t{1} << (31 + shift_), divisor));
  }
  DENSE_EXT_HOST_DEVICE int quotient(int x) const {
    const uint64_t product = uint64_t{2 * static_cast<uint32_t>(x)} * multiplier_;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift_);
  }

 private:
  uint32_t multiplier_ = 0;
  int shift_ = 0;
};

struct Patches {
  int64_t image_count;
  int height, width;          // of an image
  int images, rows, columns;  // of a patch; columns per image
  int lines;                  // of slots
  int line, bordered;         // pixels per line of the bordered patch, and in all of it
  int down, across;           // patches per image, vertically and horizontally
  int count;
  Divisor by_line, by_border, by_across, by_image;  // by_border: columns of an image and its border

  // A slot's column, counted over all images of the patch, and its line.
  DENSE_EXT_HOST_DEVICE int column_of(int slot) const { return slot / 16 / lines * 16 + slot % 16; }
  DENSE_EXT_HOST_DEVICE int line_of(int slot) const { return slot / 16 % lines; }

  // The index in the bordered patch of the upper left neighbour of a slot's pixel. Slots past the
  // last column use the last column's.
  DENSE_EXT_HOST_DEVICE int corner(int slot) const {
    const int column = std::min(column_of(slot), images * columns - 1);
    return line_of(slot) * line + column + column / columns;
  }
  // The index of a slot's pixel in the bordered patch; -1 for slots past the patch.
  DENSE_EXT_HOST_DEVICE int center(int slot) const {
    const bool used = line_of(slot) < rows && column_of(slot) < images * columns;
    return used ? corner(slot) + line + 1 : -1;
  }

  // The position of a patch: the first pixel of its first image, the number of its images, and the
  // upper left pixel of its border in each of them.
  struct Position {
    int64_t origin;
    int images, row, column;
  };
  DENSE_EXT_HOST_DEVICE Position position(int patch) const {
    const int group = by_image.quotient(patch), rest = patch - group * (down * across);
    const int y = by_across.quotient(rest), x = rest - y * across;
    const int64_t first = int64_t{group} * images, left = image_count - first;
    return {.origin = first * height * width,
            .images = left < images ? static_cast<int>(left) : images,
            .row = y * rows - 1,
            .column = x * columns - 1};
  }
  // The distance from the patch's origin to pixel p of the bordered patch, in pixels; -1 outside
  // the images.
  DENSE_EXT_HOST_DEVICE int source(const Position& at, int p) const {
    const int y = by_line.quotient(p), x = p - y * line;
    const int image = std::min(by_border.quotient(x), images - 1);
    const int row = at.row + y, column = at.column + x - image * (columns + 1);
    const bool inside =
        image < at.images && row >= 0 && row < height && column >= 0 && column < width;
    return inside ? (image * height + row) * width + column : -1;
  }
};

// The smallest number of patches that cover [N, H, W, C], and among those the smallest patches. A
// patch has at most Config::kPixels slots, in stacks of kStack lines, and at most kBordered pixels
// with a border around all lines.
template <class Config, class T>
Patches patches_of(const Pixels<T>& x) {
  constexpr int64_t kSlots = Config::kPixels, kStack = Config::kStack;
  constexpr int64_t kMost = int64_t{1} << 31;  // pixels of a patch's images, for 32-bit distances
  STD_TORCH_CHECK(x.height * x.width < kMost, "images of ", x.height, " x ", x.width,
                  " pixels are too large");
  Patches best{};
  for (int64_t most = kStack; most <= kSlots / 16 && most < x.height + kStack; most += kStack) {
    const int64_t down = ceil_div(x.height, most), rows = ceil_div(x.height, down);
    const int64_t lines = round_up(rows, kStack), longest = Config::kBordered / (lines + 2);
    const int64_t wide = kSlots / 16 / lines * 16;
    const int64_t across = ceil_div(x.width, std::min(wide, longest - 2));
    const int64_t columns = ceil_div(x.width, across);
    int64_t images = 1;
    if (across == 1) {
      images = std::min(
          {wide / columns, (longest - 1) / (columns + 1), x.images, kMost / (x.height * x.width)});
    }
    const int64_t line = images * (columns + 1) + 1;
    const int64_t count = ceil_div(x.images, images) * down * across;
    if (count > kMost / 2) continue;  // the number of a block's next patch must fit in 32 bits too
    const auto narrow = [](int64_t i) { return static_cast<int>(i); };
    const Patches patches{.image_count = x.images,
                          .height = narrow(x.height),
                          .width = narrow(x.width),
                          .images = narrow(images),
                          .rows = narrow(rows),
                          .columns = narrow(columns),
                          .lines = narrow(lines),
                          .line = narrow(line),
                          .bordered = narrow((rows + 2) * line),
                          .down = narrow(down),
                          .across = narrow(across),
                          .count = narrow(count),
                          .by_line = Divisor(narrow(line)),
                          .by_border = Divisor(narrow(columns + 1)),
                          .by_across = Divisor(narrow(across)),
                          .by_image = Divisor(narrow(down * across))};
    const auto cost = [](const Patches& p) { return std::pair(p.count, p.bordered); };
    if (best.count == 0 || cost(patches) < cost(best)) best = patches;
  }
  STD_TORCH_CHECK(best.count > 0, x.images, " images of ", x.height, " x ", x.width,
                  " pixels are too many");
  return best;
}

// The positions of the pixels of two patches, the current one and the next one, which `parity`
// tells apart. They are computed once per patch and kept in shared memory.
template <int kSlots, int kBordered, int kThreads, int kLocating = kThreads>
class Places {
 public:
  static constexpr int kInts = 4 + 2 * kBordered + kSlots;

  // The slots, and a patch that was located, can be read after the next barrier.
  __device__ Places(int* memory, const Patches& patches)
      : origins_(reinterpret_cast<int64_t*>(memory)),
        sources_(memory + 4),
        centers_(sources_ + 2 * kBordered),
        patches_(patches) {
    for (int slot = thread_index(); slot < kSlots; slot += kThreads) {
      store_shared(centers_ + slot, patches.center(slot));
    }
  }

  // kLocating threads call this, with their numbers.
  __device__ __forceinline__ void locate(int patch, int parity, int thread = thread_index()) const {
    const Patches::Position at = patches_.position(patch);
    DENSE_EXT_UNROLL for (int begin = 0; begin < kBordered; begin += kLocating) {
      const int p = begin + thread;
      if (p >= kBordered) break;
      const int source = p < patches_.bordered ? patches_.source(at, p) : -1;
      store_shared(sources_ + parity * kBordered + p, source);
    }
    if (thread == 0) store_shared(origins_ + parity, at.origin);
  }
  // The first pixel of the patch's first image.
  __device__ int64_t origin(int parity) const { return load_shared(origins_ + parity); }
  // The position of pixel p of the bordered patch, as in Patches.
  __device__ int source(int parity, int p) const {
    return load_shared(sources_ + parity * kBordered + p);
  }
  // The position of a slot's pixel; -1 if the slot has none.
  __device__ int center(int parity, int slot) const {
    const int p = load_shared(centers_ + slot);
    return p >= 0 ? source(parity, p) : -1;
  }

 private:
  int64_t* const origins_;
  int *const sources_, *const centers_;
  const Patches& patches_;
};

}  // namespace dense_ext
