// Emulates a GPU on the host, as far as csrc/cuda/device.cuh needs one; see README.md.
//
// A block's threads are fibers that run until they wait. Blocks run one after another.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dense_ext::emulator {

// --- indices of a thread, and places in the source -----------------------------------------------

// The indices of the running thread.
struct Coordinates {
  int thread, block_x, block_y, grid_y;
};
extern Coordinates running;
inline int thread_index() { return running.thread; }
inline int block_x() { return running.block_x; }
inline int block_y() { return running.block_y; }
inline int grid_y() { return running.grid_y; }

struct Place {
  const char* file;
  unsigned line;
  static Place current(std::source_location at = std::source_location::current()) {
    return {at.file_name(), at.line()};
  }
  bool operator==(const Place& other) const { return line == other.line && file == other.file; }
};

// --- launching -----------------------------------------------------------------------------------

struct Grid {
  int x, y, threads, shared_bytes;
};

// Runs `kernel` once for every thread of every block, for one caller at a time. Throws an error
// that occurs in a thread. `name` and `place` are the kernel's name and where it is launched.
void run(const Grid& grid, const std::function<void()>& kernel, const char* name, Place place);

// --- collective operations -----------------------------------------------------------------------

void barrier(Place place);
void warp_barrier(Place place);

// A barrier of `threads` of the block's threads, which bring the same `number`. Those that only
// arrive, and the last to come, go on at once or when no other thread can, by chance.
constexpr int kNamedBarriers = 16;
void named_barrier(int number, int threads, bool waits, Place place);

// Waits for the other lanes of the warp at the same place. The last lane to arrive runs `body` on
// the values `mine` of all lanes, ordered by lane.
void together(void* mine, void (*body)(void* const*), Place place);

template <class V>
V shuffle(V value, int lane, Place place) {
  struct Mine {
    V value;
    int lane;
    V result;
  } mine{value, lane, value};
  together(
      &mine,
      [](void* const* lanes) {
        for (int i = 0; i < 32; i++) {
          Mine& m = *static_cast<Mine*>(lanes[i]);
          if (m.lane < 0 || m.lane >= 32)
            throw std::runtime_error("shuffle from a lane outside the warp");
          m.result = static_cast<Mine*>(lanes[m.lane])->value;
        }
      },
      place);
  return mine.result;
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Place place);

// `kind` is 0 for bfloat16, 1 for half, 2 for tf32.
void multiply_accumulate(int kind, float* c, const uint32_t* a, const uint32_t* b, Place place);
template <class T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Place place) {
  if constexpr (sizeof(T) == 4) {
    multiply_accumulate(2, c, a, b, place);
  } else {
    multiply_accumulate(T::kIsHalf ? 1 : 0, c, a, b, place);
  }
}

// --- memory --------------------------------------------------------------------------------------

// Array number `index` of the block's shared memory. It is allocated on its own, so that a
// sanitizer knows its bounds. It takes `reserved` bytes of the shared memory that the launch
// requested.
void* shared_array(int index, int64_t bytes, int64_t reserved);

void copy_async(void* shared, const void* global, int bytes, bool valid, Place place);
void copy_async_commit();
void copy_async_wait(int groups);

void global_access(const void* p, int bytes, bool is_store, Place place);
void shared_access(const void* p, int bytes, Place place);

// --- conversions ---------------------------------------------------------------------------------

uint16_t bfloat16_of(float x);
uint16_t half_of(float x);
float float_of_half(uint16_t bits);
uint32_t tf32_of(float x);

// --- settings and counters -----------------------------------------------------------------------

enum class Order { kRandom, kFirst, kLast };  // which warp runs ahead of the others

struct Settings {
  uint64_t seed = 0;
  Order order = Order::kRandom;
  int multiprocessors = 4;
  int shared_bytes = 227 << 10;  // maximum per block
  bool count = false;            // whether to count accesses and bank conflicts; slow
  bool execute = true;           // whether launched kernels run; the host's time is seen without
};
Settings& settings();

struct Counters {
  int64_t launches = 0, launched_blocks = 0;  // also of kernels that do not run
  int64_t blocks = 0, barriers = 0, products = 0;
  int64_t global_loads = 0, global_stores = 0;      // bytes
  int64_t global_requests = 0, global_sectors = 0;  // per warp; of 32 bytes
  int64_t shared_requests = 0;                      // per warp
  // The passes of 128 bytes of such requests, and those beyond the minimum, by place in the source.
  std::map<std::string, int64_t> shared_passes, bank_conflicts;
  // The sectors of shared memory beyond the minimum that such requests of 16 bytes a lane touch.
  std::map<std::string, int64_t> split_sectors;
  // For each launched kernel, by file and name: threads per block, and the maximum shared memory.
  std::map<std::pair<std::string, std::string>, std::pair<int, int>> kernels;
};
Counters& counters();

}  // namespace dense_ext::emulator

namespace emulator = dense_ext::emulator;
