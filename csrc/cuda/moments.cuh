// Mean and variance in one pass over the values: merging them, and those of a tile's columns.

#pragma once

#include <bit>

#include "tile.cuh"

namespace dense_ext {

// The mean and the sum of squared deviations (m2) of `count` values, merged as in Chan, Golub and
// LeVeque (1979).
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float together = count + other.count, delta = other.mean - mean;
    const float fraction = other.count / together;
    mean += delta * fraction;
    m2 += other.m2 + delta * delta * (count * fraction);
    count = together;
  }
};

// The moments of a tile's columns, over all tiles of a block. A thread has a unit in every
// kParts-th row. It sums the distances of its values from a pivot, and the squares of these
// distances. The pivot is the mean of the first values that the thread sees. So the distance of the
// mean from the pivot is small beside the deviations, and subtracting its square from the sum of
// squares loses no digits. At the end each thread's sums become count, mean and m2, and are merged.
template <class T, int kColumns, int kThreads>
class ColumnMoments {
  using Part = UnitVector<T, kColumns>;
  static constexpr int kElements = Part::kElements, kUnits = kColumns / kElements;
  static constexpr int kSide = kUnits % 16 == 0 ? 16 : kUnits, kAcross = kUnits / kSide;
  static constexpr int kStep = kSide * kElements, kParts = kThreads / kSide;
  // Floats of a part's means or m2. The padding puts the rows that eight threads store at once into
  // different banks.
  static constexpr int kPartSize = Part::kSize + 4;
  static_assert(kColumns <= kThreads && kSide <= 16);

 public:
  static constexpr int kPivots = kThreads * kAcross * kElements;  // in elements of T
  // Groups of threads that merge the parts side by side: the largest power of two there is.
  static constexpr int kGroups =
      std::bit_floor(static_cast<unsigned>(std::min(kThreads / kColumns, kParts)));
  static constexpr int kScratch = kParts * (2 * kPartSize + 1) + kGroups;  // in floats

  __device__ explicit ColumnMoments(T* pivots)
      : pivots_(pivots + thread_index() * kElements),
        row_(thread_index() / kSide),
        column_(thread_index() % kSide * kElements) {
    if (kSide == 4) row_ = spread(row_);
    if (row_ >= kParts) row_ = 1 << 30;  // a leftover thread has no rows
  }

  // Adds the rows of a tile for which `valid(r)`.
  template <int kRows, class Valid>
  __device__ __forceinline__ void add(const T* tile, int ld, const Valid& valid) {
    if (count_ == 0) choose_pivots<kRows>(tile, ld, valid);
    Vector<T, 16> pivot[kAcross];
    DENSE_EXT_UNROLL for (int i = 0; i < kAcross; i++) {
      pivot[i] = Vector<T, 16>(load_shared(pivot_at(i)));
    }
    DENSE_EXT_UNROLL for (int begin = 0; begin < kRows; begin += kParts) {
      const int r = begin + row_;
      if (r >= kRows || !valid(r)) continue;
      count_++;
      DENSE_EXT_UNROLL for (int i = 0; i < kAcross; i++) {
        const Vector<T, 16> x(load_shared(unit_at(tile + r * ld + column_ + i * kStep)));
        DENSE_EXT_UNROLL for (int e = 0; e < kElements; e++) {
          const float distance = x.value[e] - pivot[i].value[e];
          sum_[i][e] += distance;
          squares_[i][e] += distance * distance;
        }
      }
    }
  }

  // Thread c gets the moments of column c. All threads of the block must call it; `scratch` is free
  // memory of kScratch floats.
  //
  // Group g merges every kGroups-th part, from part g on, and leaves the result in part g's place,
  // which no other group reads. Then the groups are merged in a tree.
  __device__ Moments merged(float* scratch) const {
    leave_part(scratch);
    sync_threads();
    const int c = thread_index() % kColumns, group = thread_index() / kColumns;
    float* const counts = scratch + 2 * kParts * kPartSize;
    float* const group_counts = counts + kParts;
    const auto means_of = [&](int part) { return scratch + part * kPartSize + Part::place(c); };
    const auto merge = [&](Moments& total, int part, const float* count) {
      const float* const means = means_of(part);
      total.merge(
          {load_shared(count), load_shared(means), load_shared(means + kParts * kPartSize)});
    };
    Moments total;
    if (group < kGroups) {
      DENSE_EXT_NO_UNROLL for (int part = group; part < kParts; part += kGroups) {
        merge(total, part, counts + part);
      }
    }
    DENSE_EXT_NO_UNROLL for (int left = kGroups; left > 1; left /= 2) {
      if (group < left) {
        store_shared(means_of(group), total.mean);
        store_shared(means_of(group) + kParts * kPartSize, total.m2);
        if (c == 0) store_shared(group_counts + group, total.count);
      }
      sync_threads();
      if (group < left / 2) merge(total, group + left / 2, group_counts + group + left / 2);
    }
    return total;
  }

 private:
  template <int kRows, class Valid>
  __device__ __forceinline__ void choose_pivots(const T* tile, int ld, const Valid& valid) const {
    DENSE_EXT_NO_UNROLL for (int i = 0; i < kAcross; i++) {
      float sum[kElements] = {};
      int count = 0;
      DENSE_EXT_NO_UNROLL for (int r = row_; r < kRows; r += kParts) {
        if (!valid(r)) continue;
        count++;
        const Vector<T, 16> x(load_shared(unit_at(tile + r * ld + column_ + i * kStep)));
        DENSE_EXT_UNROLL for (int e = 0; e < kElements; e++) sum[e] += x.value[e];
      }
      Vector<T, 16> mean;
      const float share = count > 0 ? 1 / static_cast<float>(count) : 0;
      DENSE_EXT_UNROLL for (int e = 0; e < kElements; e++) mean.value[e] = sum[e] * share;
      store_shared(pivot_at(i), mean.stored());
    }
  }

  __device__ __forceinline__ void leave_part(float* scratch) const {
    if (row_ >= kParts) return;
    DENSE_EXT_UNROLL for (int i = 0; i < kAcross; i++) {
      float mean[kElements] = {}, m2[kElements] = {};
      if (count_ > 0) {
        const Vector<T, 16> pivot(load_shared(pivot_at(i)));
        DENSE_EXT_UNROLL for (int e = 0; e < kElements; e++) {
          const float away = sum_[i][e] / static_cast<float>(count_);
          const float rest = squares_[i][e] - sum_[i][e] * away;
          mean[e] = pivot.value[e] + away;
          m2[e] = rest < 0 ? 0 : rest;
        }
      }
      float* const part = scratch + row_ * kPartSize;
      Part::store(part, column_ + i * kStep, mean);
      Part::store(part + kParts * kPartSize, column_ + i * kStep, m2);
    }
    if (column_ == 0) {
      store_shared(scratch + 2 * kParts * kPartSize + row_, static_cast<float>(count_));
    }
  }

  __device__ auto* pivot_at(int i) const { return unit_at(pivots_ + i * kThreads * kElements); }

  T* const pivots_;  // of this thread
  int row_, column_;
  int count_ = 0;
  float sum_[kAcross][kElements] = {}, squares_[kAcross][kElements] = {};
};

}  // namespace dense_ext
