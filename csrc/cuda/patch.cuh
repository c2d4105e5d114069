// Patches of images for 3x3 convolutions: a rectangle of pixels of one or, where they are small,
// several images, with a border one pixel wide around each.

#pragma once

#include <utility>

#include "tensor.cuh"

namespace dense_ext {

struct Patches {
  int64_t image_count;
  int height, width;          // of an image
  int images, rows, columns;  // of a patch
  int64_t down, across;       // patches of an image

  DENSE_EXT_HOST_DEVICE int64_t count() const {
    return (image_count + images - 1) / images * down * across;
  }
  // Pixels from a line of the bordered patch to the next, and in all of it.
  DENSE_EXT_HOST_DEVICE int line() const { return columns + 2; }
  DENSE_EXT_HOST_DEVICE int bordered() const { return images * (rows + 2) * line(); }

  // The upper left neighbour of the patch's pixel r, in the bordered patch; 0 beyond the last
  // pixel.
  DENSE_EXT_HOST_DEVICE int corner(int r) const {
    if (r >= images * rows * columns) return 0;
    const int image = r / (rows * columns), in_image = r % (rows * columns);
    return (image * (rows + 2) + in_image / columns) * line() + in_image % columns;
  }

  // The first pixel of the patch's first image.
  DENSE_EXT_HOST_DEVICE int64_t origin(int64_t patch) const {
    return patch / (down * across) * images * height * width;
  }
  // Where pixel p of the bordered patch lies, counted from the origin; -1 outside the images.
  DENSE_EXT_HOST_DEVICE int source(int64_t patch, int p) const {
    const int image = p / ((rows + 2) * line()), in_image = p % ((rows + 2) * line());
    const int row = static_cast<int>(patch / across % down) * rows + in_image / line() - 1;
    const int column = static_cast<int>(patch % across) * columns + in_image % line() - 1;
    const bool inside = image < images && patch / (down * across) * images + image < image_count &&
                        row >= 0 && row < height && column >= 0 && column < width;
    return inside ? (image * height + row) * width + column : -1;
  }
};

// The patches of at most `pixels` pixels, `bordered` with their border, that cover [N, H, W, C] in
// the least number, and of those the smallest.
template <class T>
Patches patches_of(const Pixels<T>& x, int pixels, int bordered) {
  STD_TORCH_CHECK(x.height * x.width < int64_t{1} << 31, "images of ", x.height, " x ", x.width,
                  " pixels are too large");
  Patches best{};
  for (int64_t columns = 1; columns <= std::min<int64_t>(x.width, pixels); columns++) {
    const int64_t most = std::min(pixels / columns, bordered / (columns + 2) - 2);
    if (most < 1) break;
    const int64_t down = ceil_div(x.height, most), across = ceil_div(x.width, columns);
    const int64_t rows = ceil_div(x.height, down);
    int64_t images = 1;
    if (down == 1 && across == 1) {
      images = std::min(
          {int64_t{pixels} / (rows * columns), bordered / ((rows + 2) * (columns + 2)), x.images});
    }
    const Patches patches{x.images,
                          static_cast<int>(x.height),
                          static_cast<int>(x.width),
                          static_cast<int>(images),
                          static_cast<int>(rows),
                          static_cast<int>(columns),
                          down,
                          across};
    const auto cost = [](const Patches& p) { return std::pair(p.count(), p.bordered()); };
    if (best.images == 0 || cost(patches) < cost(best)) best = patches;
  }
  return best;
}

}  // namespace dense_ext
