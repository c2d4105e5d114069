// A batch norm's scale and shift.

#pragma once

#include <cmath>
#include <cstdint>

namespace dense_ext {

// scale = weight / sqrt(var + eps), shift = bias - mean*scale; all [count]
template <class A>
void scale_and_shift(const A* mean, const A* var, const A* weight, const A* bias, double eps,
                     int64_t count, A* scale, A* shift) {
  for (int64_t c = 0; c < count; c++) {
    const A s = weight[c] / std::sqrt(var[c] + static_cast<A>(eps));
    shift[c] = bias[c] - mean[c] * s;
    scale[c] = s;
  }
}

}  // namespace dense_ext
