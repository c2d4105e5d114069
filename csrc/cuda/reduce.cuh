// The second stage of every reduction: what the blocks of a kernel left behind, one row of floats
// each, put together in a fixed order.

#pragma once

#include <cstdint>

#include "launch.cuh"

namespace dense_ext {

// Rows [count, mean of each channel, m2 of each channel] -> mean and biased variance.
void merge_moments(const Tensor& rows, int64_t row_count, int64_t channels, float* mean, float* var);

// Where sums of rows go: the first `vector_size` to a vector, the rest, the elements of a weight
// gradient [taps][out][in], to a tensor of T of any strides.
template <class T>
struct Sums {
  float* vector;
  int64_t vector_size;
  bool accumulate;  // add to the vector
  T* weight;        // null: there is none
  int64_t taps, out, in;
  int64_t out_stride, in_stride, row_stride, column_stride;  // of a tap: row tap / 3, column tap % 3
};

template <class T>
void add_rows(const Tensor& rows, int64_t row_count, const Sums<T>& to);

}  // namespace dense_ext
