// Reductions over pixels by several tiles and threads: channel moments, channel sums and weight
// gradients. Each part of the work, run by one thread, owns a row of partial results; finish()
// combines the rows in order.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "rows.h"
#include "tensor.h"

namespace dense_ext {

// The mean and variance of every channel. Tiles are merged by the formula of Chan, Golub and
// LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). It
// avoids E[x^2] - E[x]^2, which cancels.
class Moments {
 public:
  static int64_t bytes(int64_t parts, int64_t channels) {
    return bytes_of<double>(parts * (1 + 2 * channels));
  }
  Moments(Workspace& workspace, int64_t parts, int64_t channels)
      : parts_(parts),
        channels_(channels),
        data_(workspace.take<double>(parts * (1 + 2 * channels))) {}

  void clear(int64_t part) { std::fill(row(part), row(part + 1), 0.0); }

  // Adds `count` pixels with the given mean and m2 (sum of squared deviations).
  void merge(int64_t part, double count, const double* mean, const double* m2) {
    double* total = row(part);
    const double together = total[0] + count;
    const double fraction = count / together, weight = total[0] * fraction;
    double* means = total + 1;
    double* squares = means + channels_;
    for (int64_t c = 0; c < channels_; c++) {
      const double delta = mean[c] - means[c];
      means[c] += delta * fraction;
      squares[c] += m2[c] + delta * delta * weight;
    }
    total[0] = together;
  }

  // Computes the moments of a tile's rows, which are in the cache, and adds them. T may be a
  // storage type or the accumulation type of scratch. The rows are taken as many at a time as
  // moments_of_rows is exact for.
  template <class T>
  void add_rows(int64_t part, const T* x, int64_t stride, int64_t rows) {
    constexpr int64_t kAtOnce = 1024;
    const int64_t padded = round_up(channels_, kPanel<Acc<T>>);
    double* mean = scratch<double>(Slot::kStatistics, 2 * padded);
    for (int64_t r = 0; r < rows; r += kAtOnce) {
      const int64_t count = std::min(kAtOnce, rows - r);
      moments_of_rows(x + r * stride, stride, count, channels_, mean, mean + padded);
      merge(part, static_cast<double>(count), mean, mean + padded);
    }
  }

  template <class A>
  void finish(A* mean, A* var) {
    for (int64_t p = 1; p < parts_; p++) {
      merge(0, row(p)[0], row(p) + 1, row(p) + 1 + channels_);
    }
    const double* means = row(0) + 1;
    for (int64_t c = 0; c < channels_; c++) {
      mean[c] = static_cast<A>(means[c]);
      var[c] = static_cast<A>(means[channels_ + c] / row(0)[0]);
    }
  }

 private:
  double* row(int64_t part) { return data_ + part * (1 + 2 * channels_); }

  int64_t parts_, channels_;
  double* data_;
};

// The sums [2, C] of a backward. They are in double, so that the number of tiles hardly affects
// their rounding.
class ChannelSums {
 public:
  static int64_t bytes(int64_t parts, int64_t channels) {
    return bytes_of<double>(parts * 2 * padded(channels));
  }
  ChannelSums(Workspace& workspace, int64_t parts, int64_t channels)
      : parts_(parts),
        channels_(channels),
        ld_(padded(channels)),
        data_(workspace.take<double>(parts * 2 * ld_)) {}

  int64_t ld() const { return ld_; }
  double* row(int64_t part) { return data_ + part * 2 * ld_; }
  void clear(int64_t part) { std::fill(row(part), row(part + 1), 0.0); }

  template <class A>
  void finish(A* sums) {
    for (int64_t p = 1; p < parts_; p++) {
      for (int64_t i = 0; i < 2 * ld_; i++) row(0)[i] += row(p)[i];
    }
    for (int64_t c = 0; c < channels_; c++) {
      sums[c] = static_cast<A>(row(0)[c]);
      sums[channels_ + c] = static_cast<A>(row(0)[ld_ + c]);
    }
  }

 private:
  // Padded because mask_rows adds whole vectors.
  static int64_t padded(int64_t channels) { return round_up(channels, kPanel<float>); }

  int64_t parts_, channels_, ld_;
  double* data_;
};

// partial[0][range] += partial[p][range] for p = 1, 2, ... in order; the parts are `size` apart.
template <class A>
void add_parts(A* partial, int64_t parts, int64_t size, Range range) {
  for (int64_t p = 1; p < parts; p++) {
    const A* other = partial + p * size;
    for (int64_t i = range.begin; i < range.end; i++) partial[i] += other[i];
  }
}

}  // namespace dense_ext
