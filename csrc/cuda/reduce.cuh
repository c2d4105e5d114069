// The second stage of every reduction: what the blocks of a kernel left behind, one row of floats
// each, put together in a fixed order.

#pragma once

#include <cstdint>

#include "launch.cuh"

namespace dense_ext {

// Rows [count, mean of each channel, m2 of each channel] -> mean and biased variance.
void merge_moments(const Tensor& rows, int64_t row_count, int64_t channels, float* mean,
                   float* var);

// Calls launch(rows) to leave such rows, and merges them; with null where no moments are wanted.
template <class Launch>
void with_moments(int64_t row_count, int64_t channels, const Tensor& like, float* mean, float* var,
                  const Launch& launch) {
  if (!mean) return launch(nullptr);
  const Tensor rows = scratch(row_count * (1 + 2 * channels), like);
  launch(static_cast<float*>(rows.data_ptr()));
  merge_moments(rows, row_count, channels, mean, var);
}

// Where sums of rows go: the first `vector_size` to a vector, the rest, the elements of a weight
// gradient [taps][out][in], to a tensor of T of any strides.
template <class T>
struct Sums {
  float* vector;
  int64_t vector_size;
  bool accumulate;        // add to the vector
  Weight<T> weight = {};  // data null: there is none
  int64_t taps = 0;

  // The `count` output channels of a weight gradient from `first` on.
  void set_weight(const Weight<T>& gradient, int64_t first, int64_t count, int64_t tap_count) {
    weight = gradient;
    weight.data += first * gradient.out_stride;
    weight.out = count;
    taps = tap_count;
  }
};

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to);

}  // namespace dense_ext
