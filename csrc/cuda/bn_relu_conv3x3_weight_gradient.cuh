// What the weight warps of bn_relu_conv3x3_backward.cuh do: dW, each for its channels and all taps.

#pragma once

#include "bn_relu_conv3x3_backward.cuh"

namespace dense_ext {
namespace {

template <class Config>
__device__ __forceinline__ void BackwardBlock<Config>::compute_weight_gradient() const {
  WeightGradient dw = {};
  const bool wanted = args.wants_weight && weight_row() < out;
  for_patches([&](const Stage& at, int parity) {
    if (wanted) add_weight_gradient(dw, at, keep + parity * kPixels);
  });
  if (wanted) write_weight_gradient(dw);
}

// Adds to dW: goes down the lines of dy, and pairs each with the lines of z that use it, which
// are the same line and the two before.
template <class Config>
__device__ __forceinline__ void BackwardBlock<Config>::add_weight_gradient(
    WeightGradient& dw, const Stage& at, const BitsOf<T>* used) const {
  const TransposedColumnFragments<T> columns(kInLd, 8 * (kFragments - 1));
  float scales[kFragments], shifts[kFragments];
  DENSE_EXT_UNROLL for (int j = 0; j < kFragments; j++) {
    scales[j] = load_shared(scale() + weight_column() + 8 * j + lane_index() / 4);
    shifts[j] = load_shared(shift() + weight_column() + 8 * j + lane_index() / 4);
  }
  const int width = patches.images * patches.columns;
  DENSE_EXT_NO_UNROLL for (int x = 0; x < width; x += Math::kDepth) {
    const int first = x / 16 * 16 * patches.lines + x % 16;
    const TransposedRowFragment<T> rows(
        [&](int r) { return patches.corner(first + r) * kOutLd + weight_row(); });
    uint32_t b[3][kFragments][2] = {};  // line l is b[l % 3]
    DENSE_EXT_NO_UNROLL for (int begin = 0; begin < patches.rows + 2; begin += 3) {
      DENSE_EXT_UNROLL for (int i = 0; i < 3; i++) {
        const int l = begin + i, slot = first + 16 * l;
        if (l >= patches.rows + 2) break;
        uint32_t a[3][4];
        DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
          rows.load(a[dx], at.dy + (l * patches.line + dx) * kOutLd);
        }
        // Loaded now, z arrives while the products of the lines before are under way.
        if (l < patches.rows) {
          uint32_t unused[2];
          columns.load(b[i][0], kFragments == 1 ? unused : b[i][kFragments - 1],
                       at.z + slot * kInLd + weight_column(), kInLd);
        }
        const auto add = [&](int before) {
          DENSE_EXT_UNROLL for (int dx = 0; dx < 3; dx++) {
            multiply<Math>(dw[kTaps - 1 - (3 * before + dx)], a, b[(i + 3 - before) % 3], 0, dx);
          }
        };
        if (l >= 2) add(2);
        if (l >= 1 && l <= patches.rows) add(1);
        if (l < patches.rows) {
          DENSE_EXT_UNROLL for (int j = 0; j < kFragments; j++) {
            activate_column<T>(b[i][j], scales[j], shifts[j]);
          }
          keep_rows<T>(b[i], used + slot);
          add(0);
        }
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void BackwardBlock<Config>::write_weight_gradient(
    const WeightGradient& dw) const {
  float* row = args.rows + block_y() * args.row_size + 2 * args.z.channels + first_in;
  DENSE_EXT_UNROLL for (int tap = 0; tap < kTaps; tap++) {
    for_pairs(dw[tap], [&](int r, int column, float left, float right) {
      const int k = weight_row() + r, b = weight_column() + column;
      float* to = row + (int64_t{tap} * out + k) * args.z.channels + b;
      if (k < out && b < ins) store_global(to, left);
      if (k < out && b + 1 < ins) store_global(to + 1, right);
    });
  }
}

}  // namespace
}  // namespace dense_ext
