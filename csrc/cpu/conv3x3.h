// Shared by the 3x3 convolution's forward and backward: its weight, the offsets of its taps, and
// the final reduction of the weight gradient. For volumes it is a 3x3x3 convolution, whose taps are
// those of three planes.

#pragma once

#include <atomic>
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

// T m T^T for a matrix m of vectors, with kIn rows and columns, to one with kOut of them.
// transform(at, put) computes T times a column: it calls put(i, value) for each i from values
// at(i).
template <class V, int kIn, int kOut, class Transform, class At, class Put>
inline void transform_both_sides(const Transform& transform, const At& at, const Put& put) {
  V rows[kOut][kIn];
  DENSE_UNROLL for (int x = 0; x < kIn; x++) {
    transform([&](int i) { return at(i, x); }, [&](int i, V v) { rows[i][x] = v; });
  }
  DENSE_UNROLL for (int i = 0; i < kOut; i++) {
    transform([&](int x) { return rows[i][x]; }, [&](int x, V v) { put(i, x, v); });
  }
}

// The weight gradients [tap][in][out] of the parts (threads), in a workspace. Their rows are padded
// to whole vectors. With 16 taps a plane they are points of Winograd's algorithm (see winograd.h),
// of the reversed weight.
template <class T>
class Conv3x3WeightGradient {
  using A = Acc<T>;
  using V = Vector<A>;

 public:
  // If `grad` has no data, the gradient is not wanted and takes no memory.
  Conv3x3WeightGradient(const Conv3x3Weight<T>& grad, int64_t parts, int64_t plane_taps)
      : grad_(grad), parts_(parts), plane_taps_(plane_taps) {}

  bool wanted() const { return grad_.data != nullptr; }
  int64_t ld() const { return whole_vectors<A>(grad_.out); }
  int64_t bytes() const { return bytes_of<A>(parts_ * size()); }
  void take(Workspace& workspace) { partial_ = workspace.take<A>(parts_ * size()); }
  void clear(int64_t part) { std::fill_n(partial_ + part * size(), size(), A{0}); }
  A* row(int64_t part, int64_t tap, int64_t channel) {
    return partial_ + part * size() + (tap * grad_.in + channel) * ld();
  }

  // grad[k][c][tap] = sum over parts of row(part, tap, c)[k]. Returns whether it stands: if it
  // comes from points, it has to be finite.
  bool finish() {
    std::atomic<bool> stands = true;
    const int64_t threads = std::min(num_threads(), grad_.in);
    parallel(threads, [&](int64_t thread) {
      const Range range = part_of(grad_.in, threads, thread);
      for (int64_t c = range.begin; c < range.end; c++) {
        for (int64_t plane = 0; plane < grad_.planes; plane++) {
          if (!write_plane(plane, c)) stands = false;
        }
      }
    });
    return stands;
  }

 private:
  int64_t size() const { return wanted() ? grad_.planes * plane_taps_ * grad_.in * ld() : 0; }

  bool write_plane(int64_t plane, int64_t channel) {
    for (int64_t t = 0; t < plane_taps_; t++) {
      add_parts(row(0, plane * plane_taps_ + t, channel), parts_, size(), {0, grad_.out});
    }
    const bool points = plane_taps_ != kTaps;
    if (points) points_to_taps(plane, channel);
    A probe = 0;  // 0 * each value, summed: NaN if one is not finite
    for (int64_t t = 0; t < kTaps; t++) {
      const int64_t tap = plane * kTaps + t;
      const A* sum = row(0, plane * plane_taps_ + t, channel);
      T* target = grad_.data + channel * grad_.in_stride +
                  grad_.tap_offset(points ? grad_.taps() - 1 - tap : tap);
      for (int64_t k = 0; k < grad_.out; k++) {
        probe += 0 * sum[k];
        target[k * grad_.out_stride] = static_cast<T>(sum[k]);
      }
    }
    return !points || probe == 0;
  }

  // G^T u G, in place of its first nine points.
  void points_to_taps(int64_t plane, int64_t channel) {
    const auto transform = [](const auto& u, const auto& put) {
      const V half = (u(1) + u(2)) / 2;
      put(0, u(0) + half);
      put(1, (u(1) - u(2)) / 2);
      put(2, half + u(3));
    };
    A* u = row(0, plane * plane_taps_, channel);
    const int64_t stride = grad_.in * ld();
    for (int64_t k = 0; k < ld(); k += kLanes<A>, u += kLanes<A>) {
      transform_both_sides<V, 4, 3>(
          transform, [&](int i, int x) { return load(u + (4 * i + x) * stride); },
          [&](int i, int x, V v) { store(u + (3 * i + x) * stride, v); });
    }
  }

  const Conv3x3Weight<T> grad_;
  const int64_t parts_, plane_taps_;
  A* partial_ = nullptr;
};

}  // namespace dense_ext
