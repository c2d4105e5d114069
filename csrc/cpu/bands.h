// Tiles for 3x3 windows: bands of whole rows, copied to scratch with a border one pixel wide. For
// 3x3x3 windows, one plane of the windows at a time.

#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "tensor.h"

namespace dense_ext {

// Rows [row, row + rows) of images [image, image + images). A band with several images holds whole
// images, so its pixels are consecutive in NHWC memory. A line is one row of one image.
struct Band {
  int64_t image, images, row, rows, height, width;
  int64_t planes;  // how many images are a volume

  int64_t first_pixel() const { return (image * height + row) * width; }
  int64_t lines() const { return images * rows; }
  int64_t pixels() const { return lines() * width; }
  // The number of pixels with the border: [images][rows + 2][width + 2].
  int64_t padded_pixels() const { return images * (rows + 2) * (width + 2); }
  // Whether the image `offset` planes beyond this line's is of the same volume.
  bool has_plane(int64_t line, int64_t offset) const {
    return inside((image + line / rows) % planes + offset);
  }
  bool inside(int64_t plane) const { return plane >= 0 && plane < planes; }
  // The index, in the band with its border, of the upper left neighbour of the line's first pixel.
  int64_t padded_line(int64_t line) const {
    return (line / rows * (rows + 2) + line % rows) * (width + 2);
  }
};

// Splits N x H x W into bands whose padded pixels, of `pixel_bytes` each, fit into `budget` bytes.
// If possible, the number of bands is a multiple of `threads`. max_rows is at least kMinRows: the
// border of a smaller band would cost more than its pixels. A band of a part of an image has a
// multiple of `unit` rows, unless it is the last.
class Bands {
 public:
  template <class T>
  Bands(const Volumes<T>& pixels, int64_t pixel_bytes, int64_t budget, int64_t threads,
        int64_t unit)
      : images_(pixels.images),
        height_(pixels.height),
        width_(pixels.width),
        planes_(pixels.planes),
        unit_(unit),
        groups_(images_) {
    const int64_t line_bytes = (width_ + 2) * pixel_bytes;
    const int64_t max_rows = std::max(kMinRows, budget / line_bytes - 2);
    per_image_ = std::max(ceil_div(height_, max_rows), ceil_div(threads, images_));
    per_image_ = std::min(per_image_, units());
    if (per_image_ == 1) {
      const int64_t max_images = std::max<int64_t>(1, budget / ((height_ + 2) * line_bytes));
      groups_ = std::min(images_, round_up(ceil_div(images_, max_images), threads));
    }
    parts_ = std::min(count(), threads);
  }

  int64_t count() const { return groups_ * per_image_; }
  int64_t parts() const { return parts_; }
  Range of_part(int64_t part) const { return part_of(count(), parts_, part); }

  Band operator[](int64_t i) const {
    const Range images = part_of(images_, groups_, i / per_image_);
    const Range part = part_of(units(), per_image_, i % per_image_);
    const Range rows = {part.begin * unit_, std::min(part.end * unit_, height_)};
    return {images.begin, images.size(), rows.begin, rows.size(), height_, width_, planes_};
  }

  // Upper bounds over all bands, for allocating scratch.
  int64_t max_rows() const { return std::min(ceil_div(units(), per_image_) * unit_, height_); }
  int64_t max_lines() const { return ceil_div(images_, groups_) * max_rows(); }
  int64_t max_pixels() const { return max_lines() * width_; }
  int64_t max_padded_pixels() const {
    return ceil_div(images_, groups_) * (max_rows() + 2) * (width_ + 2);
  }

 private:
  int64_t units() const { return ceil_div(height_, unit_); }

  static constexpr int64_t kMinRows = 4;
  int64_t images_, height_, width_, planes_, unit_, groups_, per_image_, parts_;
};

// Fills a band with its border, from the images that are `offset` planes beyond the band's:
// fill(pixel, out) computes the `width` pixels of one line, starting at `pixel`. Border lines
// inside the image are computed too; outside the image or the volume all is zero.
template <class E, class Fill>
void fill_padded(const Band& band, int64_t offset, E* out, int64_t ld, const Fill& fill) {
  const auto zero = [&](int64_t pixels) {
    std::memset(out, 0, pixels * ld * sizeof(E));
    out += pixels * ld;
  };
  for (int64_t i = band.image; i < band.image + band.images; i++) {
    const bool exists = band.inside(i % band.planes + offset);
    for (int64_t h = band.row - 1; h <= band.row + band.rows; h++) {
      if (!exists || h < 0 || h >= band.height) {
        zero(band.width + 2);
        continue;
      }
      zero(1);
      fill(((i + offset) * band.height + h) * band.width, out);
      out += band.width * ld;
      zero(1);
    }
  }
}

}  // namespace dense_ext
