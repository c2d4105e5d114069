// Everything that the kernels use of CUDA; they use nothing of it directly. Built for a GPU, each
// function is a builtin or one PTX instruction. Built with DENSE_EXT_EMULATOR, each calls
// tests/emulator, which runs the same kernels on the host.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef DENSE_EXT_EMULATOR
#include "emulator.h"
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#else
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#define DENSE_EXT_UNROLL _Pragma("unroll")
#define DENSE_EXT_NO_UNROLL _Pragma("unroll 1")
#define DENSE_EXT_ASSUME(condition) __builtin_assume(condition)
#else
#define DENSE_EXT_UNROLL
#define DENSE_EXT_NO_UNROLL
#define DENSE_EXT_ASSUME(condition)
#endif

#include "types.cuh"  // uses the names defined above

namespace dense_ext {

constexpr int kWarp = 32;

// --- indices of a thread -----------------------------------------------------------------------

#ifdef DENSE_EXT_EMULATOR
inline int thread_index() { return emulator::thread_index(); }
inline int block_x() { return emulator::block_x(); }
inline int block_y() { return emulator::block_y(); }
inline int grid_y() { return emulator::grid_y(); }
#else
__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int grid_y() { return gridDim.y; }
#endif
__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }
__device__ __forceinline__ int warp_index() { return thread_index() / kWarp; }

// --- barriers and exchange within a warp ---------------------------------------------------------

#ifdef DENSE_EXT_EMULATOR
using emulator::Place;
#define DENSE_EXT_PLACE Place place = Place::current()
#define DENSE_EXT_AT_PLACE , Place place = Place::current()
#define DENSE_EXT_HERE , place
inline void sync_threads(DENSE_EXT_PLACE) { emulator::barrier(place); }
inline void sync_warp(DENSE_EXT_PLACE) { emulator::warp_barrier(place); }
template <int kCount>
inline void sync_named(int number DENSE_EXT_AT_PLACE) {
  emulator::named_barrier(number, kCount, true, place);
}
template <int kCount>
inline void arrive_named(int number DENSE_EXT_AT_PLACE) {
  emulator::named_barrier(number, kCount, false, place);
}
template <class V>
inline V shuffle(V value, int lane DENSE_EXT_AT_PLACE) {
  return emulator::shuffle(value, lane, place);
}
template <class V>
inline V shuffle_xor(V value, int mask DENSE_EXT_AT_PLACE) {
  return emulator::shuffle(value, lane_index() ^ mask, place);
}
#else
#define DENSE_EXT_AT_PLACE
#define DENSE_EXT_HERE
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// A barrier of kCount of the block's threads, in whole warps. They bring the same number, from 1 to
// 15. The threads that only arrive do not wait, but what they wrote before can be read after it.
template <int kCount>
__device__ __forceinline__ void sync_named(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kCount) : "memory");
}
template <int kCount>
__device__ __forceinline__ void arrive_named(int number) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(kCount) : "memory");
}
template <class V>
__device__ __forceinline__ V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
#endif

// --- memory --------------------------------------------------------------------------------------

// kBytes bytes, aligned to kBytes, which move in one access.
template <int kBytes>
struct alignas(kBytes) Bytes {
  uint8_t data[kBytes];
};
template <>
struct alignas(16) Bytes<16> {
  uint32_t data[4];
};
template <>
struct alignas(8) Bytes<8> {
  uint32_t data[2];
};
template <>
struct alignas(4) Bytes<4> {
  uint32_t data[1];
};
template <>
struct alignas(2) Bytes<2> {
  uint16_t data[1];
};

// An access of 16 bytes is one instruction, however the compiler takes V apart.
template <class V>
__device__ __forceinline__ void store(V* p, const V& value) {
#ifndef DENSE_EXT_EMULATOR
  if constexpr (alignof(V) == 16) {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(value.data[0], value.data[1], value.data[2], value.data[3]);
    return;
  }
#endif
  *p = value;
}

template <class V>
__device__ __forceinline__ V load_global(const V* p DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::global_access(p, sizeof(V), false, place);
#endif
  return *p;
}
template <class V>
__device__ __forceinline__ void store_global(V* p, const V& value DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::global_access(p, sizeof(V), true, place);
#endif
  store(p, value);
}
template <class V>
__device__ __forceinline__ V load_shared(const V* p DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::shared_access(p, sizeof(V), place);
#endif
  return *p;
}
template <class V>
__device__ __forceinline__ void store_shared(V* p, const V& value DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::shared_access(p, sizeof(V), place);
#endif
  store(p, value);
}

// Adds one to a counter in global memory, and returns what it was. What a thread has read or
// written before, others can rely on that count after it; a barrier in each block extends this to
// the blocks.
__device__ __forceinline__ int count_arrival(int* counter DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::global_access(counter, sizeof(int), false, place);
  emulator::global_access(counter, sizeof(int), true, place);
  return (*counter)++;
#else
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
#endif
}

// in_register keeps a value in a register, where the compiler might compute it again at every use.
// address_of_row is base + number * stride, in bytes, in one instruction. Addresses from either are
// for copy_async and load_matrices only: the compiler no longer knows to which memory they belong.
template <class V>
__device__ __forceinline__ V in_register(V value) {
#ifndef DENSE_EXT_EMULATOR
  if constexpr (sizeof(V) == 8) {
    asm("" : "+l"(value));
  } else {
    asm("" : "+r"(value));
  }
#endif
  return value;
}
// For a branch that is rarely taken: the compiler does not execute it always, and then choose.
__device__ __forceinline__ void keep_branch() {
#ifndef DENSE_EXT_EMULATOR
  asm volatile("");
#endif
}
template <class T>
__device__ __forceinline__ const T* address_of_row(const T* base, int number, uint32_t stride) {
#ifdef DENSE_EXT_EMULATOR
  const uintptr_t distance = uintptr_t{static_cast<uint32_t>(number)} * stride;
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(base) + distance);
#else
  const T* address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(number), "r"(stride), "l"(base));
  return address;
#endif
}

// A block's dynamic shared memory, divided into arrays. Every thread takes them in the same order.
class SharedMemory {
 public:
  static constexpr int kAlign = 128;  // an array's banks don't depend on the sizes of others
  static constexpr int bytes_of(int64_t bytes) {
    return static_cast<int>((bytes + kAlign - 1) / kAlign * kAlign);
  }

  template <class T>
  __device__ T* take(int count) {
    const int bytes = bytes_of(int64_t{count} * int64_t{sizeof(T)});
#ifdef DENSE_EXT_EMULATOR
    return static_cast<T*>(emulator::shared_array(taken_++, count * sizeof(T), bytes));
#else
    extern __shared__ __align__(128) unsigned char dense_ext_shared[];
    T* array = reinterpret_cast<T*>(dense_ext_shared + taken_);
    taken_ += bytes;
    return array;
#endif
  }

 private:
  int taken_ = 0;
};

// An asynchronous copy of kBytes (4, 8, 16) from global to shared memory; writes zeros if not
// `valid`.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global,
                                           bool valid DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::copy_async(shared, global, kBytes, valid, place);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
  }
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef DENSE_EXT_EMULATOR
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kGroups of the thread's groups of copies are complete.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
#ifdef DENSE_EXT_EMULATOR
  emulator::copy_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// --- tensor cores --------------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane i passes the address of row
// i % 8 of matrix i / 8. It gets elements (i / 4, 2 * (i % 4)) and (i / 4, 2 * (i % 4) + 1) of each
// matrix, or of each transposed matrix if kTransposed. The addresses first change in the bits of
// `flip`, and then grow by `beyond` bytes.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row, uint32_t flip = 0,
                                              uint32_t beyond = 0 DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  row = reinterpret_cast<const void*>((reinterpret_cast<uintptr_t>(row) ^ flip) + beyond);
  emulator::load_matrices(r, row, kTransposed, place);
#else
  const uint32_t from = (static_cast<uint32_t>(__cvta_generic_to_shared(row)) ^ flip) + beyond;
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// x rounded to nearest, to the ten mantissa bits of tf32.
__device__ __forceinline__ uint32_t tf32_of(float x) {
#ifdef DENSE_EXT_EMULATOR
  return emulator::tf32_of(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// A warp's product c += a @ b: m16n8k16 for 16-bit T, m16n8k8 in tf32 for float. The elements that
// a lane holds, as (row, column) with g = lane / 4 and t = lane % 4:
//   c:      (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   16-bit: a: pairs along k from (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);
//           b: pairs along k from (2t, g), (2t + 8, g)
//   tf32:   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: (t, g), (t + 4, g)
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2] DENSE_EXT_AT_PLACE) {
#ifdef DENSE_EXT_EMULATOR
  emulator::multiply_accumulate<T>(c, a, b, place);
#else
#define DENSE_EXT_MMA(shape, types)                                               \
  asm volatile("mma.sync.aligned." shape ".row.col." types                        \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (sizeof(T) == 4) {
    DENSE_EXT_MMA("m16n8k8", "f32.tf32.tf32.f32");
  } else if constexpr (T::kIsHalf) {
    DENSE_EXT_MMA("m16n8k16", "f32.f16.f16.f32");
  } else {
    DENSE_EXT_MMA("m16n8k16", "f32.bf16.bf16.f32");
  }
#undef DENSE_EXT_MMA
#endif
}

}  // namespace dense_ext
