// The moments of a grid's columns. The kernel that computes them also completes them, and goes on
// with a norm that needs them: this saves a launch.

#pragma once

#include "batch_norm.cuh"
#include "moments.cuh"

namespace dense_ext {

// Blocks with the same block_x() have the same columns. Each leaves a row [count, means, m2] of
// them. Every kGroups-th of these blocks form a group, whose last block to arrive merges the
// group's rows. The last of these blocks merges the groups' rows. Rows are merged in the same order
// whichever block is last. In two steps, a block waits for memory a few times only.
struct GridMoments {
  static constexpr int kGroups = kCountersPerBlocks - 1;

  float* rows = nullptr;   // [grid x][grid y + kGroups][1 + 2 * width]; null if not wanted
  int* arrived = nullptr;  // [grid x][kGroups + 1]; zero before the kernel and after it
  int width = 0;           // the maximum columns of a block
  float *mean = nullptr, *var = nullptr;  // of all columns
  int64_t known = 0;                      // the next norm's channels before these
  ScaleShift next;                        // its scale is null if there is none

  // Floats of shared memory that `leave` needs.
  static constexpr int scratch(int threads) {
    return 1 + threads * static_cast<int>(sizeof(Moments) / sizeof(float));
  }

  // Leaves the moments of `columns` columns from `first` on; thread c has those of column c. All
  // threads of the block must call it. `memory` is free once they have.
  template <int kThreads>
  __device__ void leave(const Moments& mine, int64_t first, int columns, float* memory) const {
    const int blocks = grid_y(), groups = std::min(int{kGroups}, blocks),
              group = block_y() % kGroups;
    const int size = 1 + 2 * width;
    float* const of_blocks = rows + int64_t{block_x()} * (blocks + kGroups) * size;
    float* const of_groups = of_blocks + int64_t{blocks} * size;
    int* const counters = arrived + block_x() * (kGroups + 1);
    if (next.scale && block_x() == 0) bind_known<kThreads>();
    store_row(of_blocks + block_y() * size, mine, columns);
    const int members = (blocks - group + kGroups - 1) / kGroups;
    if (!is_last(counters + group, members, memory)) return;
    const Moments of_group = merge_rows<kThreads>(of_blocks + group * size, kGroups * size, members,
                                                  columns, memory + 1);
    store_row(of_groups + group * size, of_group, columns);
    if (!is_last(counters + kGroups, groups, memory)) return;
    const Moments total = merge_rows<kThreads>(of_groups, size, groups, columns, memory + 1);
    if (thread_index() >= columns) return;
    const int64_t c = first + thread_index();
    const float variance = total.m2 / total.count;
    store_global(mean + c, total.mean);
    store_global(var + c, variance);
    if (next.scale) next.run(known + c, total.mean, variance);
  }

 private:
  // The blocks share the next norm's channels whose statistics are known.
  template <int kThreads>
  __device__ void bind_known() const {
    for (int64_t c = int64_t{block_y()} * kThreads + thread_index(); c < known;
         c += int64_t{grid_y()} * kThreads) {
      next.run(c, load_global(next.mean + c), load_global(next.var + c));
    }
  }

  __device__ void store_row(float* row, const Moments& mine, int columns) const {
    const int c = thread_index();
    if (c >= columns) return;
    if (c == 0) store_global(row, mine.count);
    store_global(row + 1 + c, mine.mean);
    store_global(row + 1 + width + c, mine.m2);
  }

  // Whether the block is the last of `count` blocks to arrive at a counter. Then it can read what
  // the others have written, and the counter is zero again.
  __device__ static bool is_last(int* counter, int count, float* memory) {
    auto* const last = reinterpret_cast<int*>(memory);
    sync_threads();
    if (thread_index() == 0) {
      *last = count_arrival(counter) == count - 1;
      if (*last) store_global(counter, 0);
    }
    sync_threads();
    return *last;
  }

  // Merges `count` rows, `distance` floats apart. Thread c gets the moments of column c.
  template <int kThreads>
  __device__ Moments merge_rows(const float* first, int distance, int count, int columns,
                                float* memory) const {
    constexpr int kBatch = 4;  // rows that a thread loads before it waits for them
    int parts = 1;             // of the rows, which threads merge side by side
    while (2 * parts * columns <= kThreads) parts *= 2;
    const int c = thread_index() % columns, part = thread_index() / columns;
    Moments total;
    for (int r = part; part < parts && r < count; r += kBatch * parts) {
      Moments found[kBatch];
      DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) {
        if (r + n * parts >= count) continue;
        const float* const row = first + int64_t{r + n * parts} * distance;
        found[n] = {load_global(row), load_global(row + 1 + c), load_global(row + 1 + width + c)};
      }
      DENSE_EXT_UNROLL for (int n = 0; n < kBatch; n++) total.merge(found[n]);
    }
    Moments* const merged = reinterpret_cast<Moments*>(memory) + thread_index();
    *merged = total;
    for (int half = parts / 2; half > 0; half /= 2) {
      sync_threads();
      if (part < half) merged->merge(merged[half * columns]);
    }
    return *merged;
  }
};

// Where moments go.
struct MomentsTo {
  float *mean = nullptr, *var = nullptr;  // [C]; null if not wanted
  int64_t channels = 0;                   // C
  std::optional<NextNorm> next;           // a norm whose last channels these are
};

inline MomentsTo moments_to(const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                            int64_t count, const std::optional<NextNorm>& next = {}) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var go together");
  return {channels<float>(mean, "mean", count), channels<float>(var, "var", count), count, next};
}

// Calls launch(moments) with the arguments of a grid whose blocks have at most `width` columns
// each.
template <class Launch>
void with_moments(int64_t grid_x, int64_t grid_y, int width, const MomentsTo& to,
                  const Tensor& like, const Launch& launch) {
  if (!to.mean) return launch(GridMoments{});
  const int64_t count = grid_x * kCountersPerBlocks;
  const bool given = to.next && to.next->counters;
  const Tensor counters =
      given ? *to.next->counters : torch::stable::new_zeros(like, {count}, ScalarType::Int);
  STD_TORCH_CHECK(counters.numel() >= count, "the kernel takes ", count, " counters, got ",
                  counters.numel());
  const Tensor rows = scratch(grid_x * (grid_y + GridMoments::kGroups) * (1 + 2 * width), like);
  GridMoments moments{.rows = static_cast<float*>(rows.data_ptr()),
                      .arrived = static_cast<int*>(counters.data_ptr()),
                      .width = width,
                      .mean = to.mean,
                      .var = to.var};
  if (to.next) {
    moments.next = scale_shift(*to.next);
    moments.known = moments.next.channels - to.channels;
    STD_TORCH_CHECK(moments.known >= 0 && to.mean == moments.next.mean + moments.known,
                    "the next norm's last channels must be those whose moments are merged");
  }
  launch(moments);
}

}  // namespace dense_ext
