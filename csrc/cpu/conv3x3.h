// Shared by the 3x3 convolution's forward and backward: its weight, the offsets of its taps, and
// the final reduction of the weight gradient. For volumes it is a 3x3x3 convolution, whose taps are
// those of three planes.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "reduce.h"
#include "tensor.h"

namespace dense_ext {

constexpr int64_t kTaps = 9;  // of one plane
constexpr int64_t kMaxPlanes = 3;
// The channels of the convolution's input that are multiplied at a time.
constexpr int64_t kConv3x3Channels = 128;

template <class E>
int64_t whole_vectors(int64_t row) {
  return round_up(row, kLanes<E>);
}

// A weight [out, in, 3, 3] or [out, in, 3, 3, 3].
template <class T>
struct Conv3x3Weight : Weight<T> {
  int64_t planes, plane_stride;

  int64_t taps() const { return planes * kTaps; }
  int64_t tap_offset(int64_t t) const {
    return t / kTaps * plane_stride + Weight<T>::tap_offset(t % kTaps);
  }
};

// The weight for activations of `dims` dimensions; a gradient that is absent has no data.
template <class T>
Conv3x3Weight<T> conv3x3_weight(const std::optional<Tensor>& t, const char* name, int64_t out,
                                int64_t in, int64_t dims) {
  const int64_t planes = dims == 5 ? kMaxPlanes : 1;
  if (!t) return {{}, planes, 0};
  STD_TORCH_CHECK(t->dim() == dims, name, " has shape ", shape_of(*t), " for activations of ", dims,
                  " dimensions");
  return {weight_of<T>(*t, name, out, in, 3), planes, dims == 5 ? t->stride(2) : 0};
}

// The offsets of the taps, in row-major order.
struct TapOffsets {
  int64_t offset[kMaxPlanes * kTaps];

  // The offsets from the start of a padded line, whose pixels are `ld` apart, to the first pixel of
  // each tap of one plane.
  static TapOffsets in_band(int64_t width, int64_t ld) {
    TapOffsets taps;
    for (int64_t t = 0; t < kTaps; t++) taps.offset[t] = (t / 3 * (width + 2) + t % 3) * ld;
    return taps;
  }
  // The offsets of each tap's packed weights [depth][kPanel].
  template <class E>
  static TapOffsets in_panel(int64_t depth) {
    TapOffsets taps;
    for (int64_t t = 0; t < kMaxPlanes * kTaps; t++) {
      taps.offset[t] = t * elements<E>(depth) * kPanel<E>;
    }
    return taps;
  }
  // The offsets of each tap in a weight. `reversed` is for a transposed convolution, which equals a
  // convolution with its taps in reverse order.
  template <class T>
  static TapOffsets in_weight(const Conv3x3Weight<T>& weight, bool reversed) {
    TapOffsets taps;
    for (int64_t t = 0; t < weight.taps(); t++) {
      taps.offset[t] = weight.tap_offset(reversed ? weight.taps() - 1 - t : t);
    }
    return taps;
  }
};

// A 3x3 weight [out, in] as the b of forward's product.
template <class T>
WeightsAsB<T> weights_as_b(const Conv3x3Weight<const T>& w, const TapOffsets& taps) {
  return {.weights = w.data,
          .taps = w.taps(),
          .depth = w.in,
          .columns = w.out,
          .k_stride = w.in_stride,
          .j_stride = w.out_stride,
          .tap_offsets = taps.offset};
}

// The weight gradients [tap][in][out] of the parts (threads), in a workspace. Their rows are padded
// to whole vectors.
template <class T>
class Conv3x3WeightGradient {
  using A = Acc<T>;

 public:
  // If `grad` has no data, the gradient is not wanted and takes no memory.
  Conv3x3WeightGradient(const Conv3x3Weight<T>& grad, int64_t parts) : grad_(grad), parts_(parts) {}

  bool wanted() const { return grad_.data != nullptr; }
  int64_t ld() const { return whole_vectors<A>(grad_.out); }
  int64_t bytes() const { return bytes_of<A>(parts_ * size()); }
  void take(Workspace& workspace) { partial_ = workspace.take<A>(parts_ * size()); }
  void clear(int64_t part) { std::fill_n(partial_ + part * size(), size(), A{0}); }
  A* row(int64_t part, int64_t tap, int64_t channel) {
    return partial_ + part * size() + (tap * grad_.in + channel) * ld();
  }

  // grad[k][c][tap] = sum over parts of row(part, tap, c)[k]
  void finish() {
    const int64_t threads = std::min(num_threads(), grad_.in);
    parallel(threads, [&](int64_t thread) {
      const Range range = part_of(grad_.in, threads, thread);
      for (int64_t c = range.begin; c < range.end; c++) {
        for (int64_t t = 0; t < grad_.taps(); t++) write_row(t, c);
      }
    });
  }

 private:
  int64_t size() const { return wanted() ? grad_.taps() * grad_.in * ld() : 0; }

  void write_row(int64_t tap, int64_t channel) {
    A* sum = row(0, tap, channel);
    add_parts(sum, parts_, size(), {0, grad_.out});
    T* target = grad_.data + channel * grad_.in_stride + grad_.tap_offset(tap);
    for (int64_t k = 0; k < grad_.out; k++) {
      target[k * grad_.out_stride] = static_cast<T>(sum[k]);
    }
  }

  const Conv3x3Weight<T> grad_;
  const int64_t parts_;
  A* partial_ = nullptr;
};

}  // namespace dense_ext
