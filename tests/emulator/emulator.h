// A GPU on the host, as far as csrc/cuda/device.cuh needs one; see README.md.
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

// --- where a thread is, and where in the source --------------------------------------------------

// Of the thread that runs.
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

// Runs `kernel` once for every thread of every block, for one caller at a time. Throws what goes
// wrong in one of them. `name` and `place` say which kernel it is, and where it is launched.
void run(const Grid& grid, const std::function<void()>& kernel, const char* name, Place place);

// --- what threads do together --------------------------------------------------------------------

void barrier(Place place);

// Waits for the other lanes of the warp at the same place; the last to come runs `body` on what all
// of them brought: `mine` of every lane, by lane.
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

// `kind`: 0 for bfloat16, 1 for half, 2 for tf32.
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

// The index-th array of the block's shared memory: memory of its own, so that a sanitizer sees its
// ends. It takes `reserved` bytes of what the launch asked for.
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

// --- what tests set and read ---------------------------------------------------------------------

enum class Order { kRandom, kFirst, kLast };  // which warp runs ahead of the others

struct Settings {
  uint64_t seed = 0;
  Order order = Order::kRandom;
  int multiprocessors = 4;
  int shared_bytes = 227 << 10;  // a block's, at most
  bool count = false;            // accesses and bank conflicts: slow
};
Settings& settings();

struct Counters {
  int64_t launches = 0, blocks = 0, barriers = 0, products = 0;
  int64_t global_loads = 0, global_stores = 0;      // bytes
  int64_t global_requests = 0, global_sectors = 0;  // of a warp; 32 bytes each
  int64_t shared_requests = 0;                      // of a warp
  // Of such requests, by their place: passes of 128 bytes, and those beyond the least.
  std::map<std::string, int64_t> shared_passes, bank_conflicts;
  // Of each kernel launched, by its file and name: threads of a block, and the most shared memory.
  std::map<std::pair<std::string, std::string>, std::pair<int, int>> kernels;
};
Counters& counters();

}  // namespace dense_ext::emulator

namespace emulator = dense_ext::emulator;
