// The second stage of a backward reduction. In the first stage, each block of a kernel writes one
// row of partial sums in float32; here the rows are added in a fixed order. The same kernel goes on
// with a norm that needs the sums, which saves a launch.

#pragma once

#include <cstdint>

#include "batch_norm.cuh"

namespace dense_ext {

// Where add_rows writes the sums of the rows: the first 2 * `channels` columns go to a norm's
// channel sums [2, C]. The rest are the elements of a weight gradient [taps][out][in] and go to a
// tensor of T of any strides.
template <class T>
struct Sums {
  float* vector;
  int64_t channels;
  bool accumulate;         // whether to add to the vector
  NormGradient norm = {};  // the norm whose sums these are, if its gradients are to be finished
  Weight<T> weight = {};   // data is null if there is none
  int64_t taps = 0;

  // Makes the target `count` output channels of `gradient`, from `first` on.
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
