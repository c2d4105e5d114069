// Stages of shared memory, which producer warps fill and consumer warps use, in turn.

#pragma once

#include "device.cuh"

namespace dense_ext {

// The named barriers of a block of kThreads threads with kStages stages. Producers wait until a
// stage is empty, except where it is empty from the start, and say when they have filled it;
// consumers do the reverse. A side says so only if the other will wait. The kernel's own barriers
// have the numbers from kOwn on.
template <int kThreads, int kStages>
struct StageBarriers {
  enum { kFull = 1, kEmpty = kFull + kStages, kOwn = kEmpty + kStages };

  __device__ __forceinline__ static void wait_until_empty(int stage DENSE_EXT_AT_PLACE) {
    sync_named<kThreads>(kEmpty + stage DENSE_EXT_HERE);
  }
  __device__ __forceinline__ static void filled(int stage DENSE_EXT_AT_PLACE) {
    arrive_named<kThreads>(kFull + stage DENSE_EXT_HERE);
  }
  __device__ __forceinline__ static void wait_until_full(int stage DENSE_EXT_AT_PLACE) {
    sync_named<kThreads>(kFull + stage DENSE_EXT_HERE);
  }
  __device__ __forceinline__ static void emptied(int stage DENSE_EXT_AT_PLACE) {
    arrive_named<kThreads>(kEmpty + stage DENSE_EXT_HERE);
  }
};

}  // namespace dense_ext
