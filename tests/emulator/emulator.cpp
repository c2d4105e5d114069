#include "emulator.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "fiber.h"

namespace dense_ext::emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
// Stacks begin at different lines of the cache, where otherwise lanes would evict each other's.
constexpr size_t kStackColours = 32, kColourBytes = 5 * 64;
// The probabilities that a warp that could continue yields to another, and that a copy lands at
// once, or that a thread goes on at once where it need not wait.
constexpr double kRedraw = 0.02, kEager = 0.5;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  bool chance(double p) { return static_cast<double>(next() >> 11) * 0x1p-53 < p; }

 private:
  uint64_t state_;
};

constexpr Place kEnd = {"the end of the kernel", 0};

std::string text(Place place) {
  if (place == kEnd) return place.file;
  const char* name = std::strrchr(place.file, '/');
  return std::string(name ? name + 1 : place.file) + ":" + std::to_string(place.line);
}

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
  void land() const { valid ? std::memcpy(shared, global, bytes) : std::memset(shared, 0, bytes); }
};

struct Thread {
  Fiber fiber;
  int index = 0;
  Place place = {};                      // where it waits
  void* mine = nullptr;                  // its value for the other lanes of its warp
  std::deque<std::vector<Copy>> groups;  // of copies in flight; the last is not committed
};

struct Access {
  int lane;
  const void* p;
  int bytes;
};

struct Warp {
  uint32_t all = 0, ready = 0, together = 0;  // one bit per lane
  // The accesses since the warp's last collective operation, by place, whether the memory is
  // shared, and the number of the lane's access there. Accesses with equal numbers count as
  // simultaneous.
  std::map<std::tuple<const char*, unsigned, bool, size_t>, std::vector<Access>> requests;
  std::map<std::tuple<const char*, unsigned, bool, int>, size_t> times;  // by lane
};

// A barrier of some threads: how many it is for and have arrived, and those that wait.
struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

// Blocks run one at a time, on this thread.
struct Block {
  const Grid* grid = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  int at_barrier = 0, done = 0;
  Place barrier = {};
  std::array<NamedBarrier, kNamedBarriers> named;
  std::vector<Thread*> delayed;  // they go on when no other thread can
  Thread* running = nullptr;
  std::vector<std::pair<std::unique_ptr<void, decltype(&std::free)>, int64_t>> arrays;
  int64_t reserved = 0;
  std::exception_ptr error;
  Random random{0};
};
Block block;
Fiber scheduler;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("emulated GPU: " + what);
}

Warp& warp_of(const Thread& thread) { return block.warps[thread.index / kWarp]; }
uint32_t bit_of(const Thread& thread) { return 1u << thread.index % kWarp; }

// The order in which threads that can continue run.
struct Ahead {
  std::vector<int> warps;
  bool last_lane;

  Ahead() : warps(block.warps.size()), last_lane(settings().order == Order::kLast) {
    std::iota(warps.begin(), warps.end(), 0);
    if (last_lane) std::reverse(warps.begin(), warps.end());
    if (settings().order == Order::kRandom) {
      for (size_t i = warps.size() - 1; i > 0; i--)
        std::swap(warps[i], warps[block.random.next() % (i + 1)]);
      last_lane = block.random.chance(0.5);
    }
  }

  // Returns the thread to run next, or null if all wait.
  Thread* next() const {
    for (const int warp : warps) {
      const uint32_t ready = block.warps[warp].ready;
      if (ready == 0) continue;
      const int lane = last_lane ? kWarp - 1 - std::countl_zero(ready) : std::countr_zero(ready);
      return block.threads[warp * kWarp + lane].get();
    }
    return nullptr;
  }
};

std::optional<Ahead> ahead;  // of the block that runs

// Chooses the thread to run next; null if all wait.
Thread* choose() {
  block.running = ahead->next();
  if (block.running) running.thread = block.running->index;
  return block.running;
}

// Lets other threads run until this one may continue.
void wait(Place place) {
  Thread& self = *block.running;
  warp_of(self).ready &= ~bit_of(self);
  self.place = place;
  if (!block.error && block.random.chance(kRedraw)) ahead.emplace();
  // Straight to the next thread: by way of the scheduler would be two switches.
  Thread* next = block.error ? nullptr : choose();
  switch_fiber(self.fiber, next ? next->fiber : scheduler);
}

void thread_main() {
  Thread& self = *block.running;
  try {
    (*block.kernel)();
    for (const auto& group : self.groups) {
      if (!group.empty()) fail("a thread ends with copies under way that nothing waited for");
    }
  } catch (...) {
    block.error = std::current_exception();
  }
  block.done++;
  wait(kEnd);
}

// --- accesses ------------------------------------------------------------------------------------

void record(const void* p, int bytes, bool shared, Place place) {
  Warp& warp = warp_of(*block.running);
  const int lane = block.running->index % kWarp;
  const size_t time = warp.times[{place.file, place.line, shared, lane}]++;
  warp.requests[{place.file, place.line, shared, time}].push_back({lane, p, bytes});
}

struct Passes {
  int least, taken;
};

// The number of passes that a warp's access to shared memory takes, at minimum and actually: each
// bank serves one word per pass. Eight lanes access together if accesses have 16 bytes, and sixteen
// if they have 8.
Passes passes_of(const std::vector<Access>& accesses) {
  const int at_once = 128 / std::max(4, accesses.front().bytes);
  Passes passes{};
  for (int first = 0; first < kWarp; first += at_once) {
    std::array<std::unordered_set<uintptr_t>, 32> banks;
    for (const Access& access : accesses) {
      if (access.lane / at_once != first / at_once) continue;
      const auto address = reinterpret_cast<uintptr_t>(access.p);
      for (uintptr_t word = address / 4; word <= (address + access.bytes - 1) / 4; word++) {
        banks[word % 32].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.size());
    passes.least += most > 0;
    passes.taken += static_cast<int>(most);
  }
  return passes;
}

// The 32-byte sectors that accesses touch.
int64_t sectors_of(const std::vector<Access>& accesses) {
  std::unordered_set<uintptr_t> sectors;
  for (const Access& access : accesses) {
    const auto address = reinterpret_cast<uintptr_t>(access.p);
    for (uintptr_t s = address / 32; s <= (address + access.bytes - 1) / 32; s++) sectors.insert(s);
  }
  return static_cast<int64_t>(sectors.size());
}

void count_requests(Warp& warp) {
  for (const auto& [request, accesses] : warp.requests) {
    const auto& [file, line, shared, time] = request;
    if (shared) {
      const auto [least, taken] = passes_of(accesses);
      counters().shared_requests++;
      counters().shared_passes[text({file, line})] += taken;
      if (taken > least) counters().bank_conflicts[text({file, line})] += taken - least;
      if (accesses.front().bytes == 16) {
        const auto pairs = static_cast<int64_t>(accesses.size() + 1) / 2;
        const int64_t split = sectors_of(accesses) - pairs;
        if (split > 0) counters().split_sectors[text({file, line})] += split;
      }
      continue;
    }
    counters().global_requests++;
    counters().global_sectors += sectors_of(accesses);
  }
  warp.requests.clear();
  warp.times.clear();
}

// --- the scheduler -------------------------------------------------------------------------------

[[noreturn]] void deadlock() {
  std::map<std::string, int> waiting;
  for (const auto& thread : block.threads) waiting[text(thread->place)]++;
  std::string where;
  for (const auto& [place, threads] : waiting)
    where += " " + std::to_string(threads) + " at " + place + ";";
  fail("threads wait for each other:" + where);
}

// Ends a barrier when all threads have arrived.
void open_barrier() {
  block.at_barrier = 0;
  counters().barriers++;
  for (Warp& warp : block.warps) {
    warp.ready = warp.all;
    count_requests(warp);
  }
}

void run_block() {
  ahead.emplace();
  while (block.done < block.grid->threads) {
    if (choose()) {
      switch_fiber(scheduler, block.running->fiber);  // comes back when all threads wait
      if (block.error) std::rethrow_exception(block.error);
    } else if (!block.delayed.empty()) {
      for (const Thread* thread : block.delayed) warp_of(*thread).ready |= bit_of(*thread);
      block.delayed.clear();
      ahead.emplace();
    } else {
      if (block.at_barrier < block.grid->threads) deadlock();
      open_barrier();
      ahead.emplace();
    }
  }
  for (Warp& warp : block.warps) count_requests(warp);
  for (const NamedBarrier& barrier : block.named) {
    if (barrier.arrived > 0) fail("threads arrived at a barrier that nobody waits at");
  }
}

void start_block() {
  block.arrays.clear();
  block.reserved = 0;
  block.error = nullptr;
  block.at_barrier = block.done = 0;
  block.named = {};
  block.delayed.clear();
  block.warps.assign((block.grid->threads + kWarp - 1) / kWarp, {});
  while (block.threads.size() < static_cast<size_t>(block.grid->threads)) {
    block.threads.push_back(std::make_unique<Thread>());
  }
  block.threads.resize(block.grid->threads);
  for (int i = 0; i < block.grid->threads; i++) {
    Thread& thread = *block.threads[i];
    thread.index = i;
    warp_of(thread).all = warp_of(thread).ready |= bit_of(thread);
    thread.groups.assign(1, {});
    thread.fiber.start(kStackBytes - i % kStackColours * kColourBytes, thread_main);
  }
}

// A launch's blocks in the order they run, which is that of the setting for warps.
std::vector<int64_t> order_of_blocks(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (settings().order == Order::kLast) std::reverse(order.begin(), order.end());
  if (settings().order != Order::kRandom) return order;
  for (int64_t i = count - 1; i > 0; i--) {
    std::swap(order[i], order[block.random.next() % (i + 1)]);
  }
  return order;
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}
Counters& counters() {
  static Counters instance;
  return instance;
}

Coordinates running;

void run(const Grid& grid, const std::function<void()>& kernel, const char* name, Place place) {
  if (grid.x <= 0 || grid.y <= 0 || grid.y > 65535)
    fail("grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y));
  if (grid.threads <= 0 || grid.threads > 1024) fail("block of " + std::to_string(grid.threads));
  if (grid.shared_bytes > settings().shared_bytes) {
    fail(std::to_string(grid.shared_bytes) + " bytes of shared memory asked for");
  }
  counters().launches++;
  counters().launched_blocks += int64_t{grid.x} * grid.y;
  auto& [threads, shared_bytes] = counters().kernels[{text(place), name}];
  threads = grid.threads;
  shared_bytes = std::max(shared_bytes, grid.shared_bytes);
  if (!settings().execute) return;
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  block.grid = &grid;
  block.kernel = &kernel;
  block.random = Random(settings().seed);
  running.grid_y = grid.y;
  for (const int64_t index : order_of_blocks(int64_t{grid.x} * grid.y)) {
    running.block_x = static_cast<int>(index % grid.x);
    running.block_y = static_cast<int>(index / grid.x);
    start_block();
    run_block();
    counters().blocks++;
  }
}

void barrier(Place place) {
  if (block.at_barrier++ == 0) block.barrier = place;
  if (!(block.barrier == place)) {
    fail("threads wait at different barriers: " + text(block.barrier) + " and " + text(place));
  }
  wait(place);
}

void named_barrier(int number, int threads, bool waits, Place place) {
  if (number < 1 || number >= kNamedBarriers || threads % kWarp != 0) {
    fail("barrier " + std::to_string(number) + " of " + std::to_string(threads) + " threads");
  }
  NamedBarrier& barrier = block.named[number];
  if (barrier.arrived++ == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("threads disagree about a barrier at " + text(place));
  if (waits) barrier.waiting.push_back(block.running);
  const bool last = barrier.arrived == threads;
  if (last) {
    counters().barriers++;
    for (const Thread* thread : barrier.waiting) {
      Warp& warp = warp_of(*thread);
      warp.ready |= bit_of(*thread);
      if (warp.ready == warp.all) count_requests(warp);
    }
    barrier = {};
  }
  if (waits && !last) return wait(place);
  if (block.random.chance(kEager)) return;
  block.delayed.push_back(block.running);
  wait(place);
}

void together(void* mine, void (*body)(void* const*), Place place) {
  Thread& self = *block.running;
  Warp& warp = warp_of(self);
  if (warp.all != ~0u) fail("a warp of less than 32 threads acts together at " + text(place));
  const int first = self.index / kWarp * kWarp;
  if (warp.together != 0) {
    const Place other = block.threads[first + std::countr_zero(warp.together)]->place;
    if (!(other == place))
      fail("lanes of a warp act together at " + text(other) + " and " + text(place));
  }
  self.mine = mine;
  warp.together |= bit_of(self);
  if (warp.together != warp.all) return wait(place);
  void* of_lanes[kWarp];
  for (int i = 0; i < kWarp; i++) of_lanes[i] = block.threads[first + i]->mine;
  body(of_lanes);
  warp.together = 0;
  warp.ready = warp.all;
  count_requests(warp);
}

void warp_barrier(Place place) {
  together(nullptr, [](void* const*) {}, place);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Place place) {
  struct Mine {
    const void* row;
    uint32_t* r;
    bool transposed;
  } mine{row, r, transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("matrix row not aligned at " + text(place));
  if (settings().count) record(row, 16, true, place);
  together(
      &mine,
      [](void* const* lanes) {
        uint16_t rows[32][8];
        for (int i = 0; i < 32; i++) std::memcpy(rows[i], static_cast<Mine*>(lanes[i])->row, 16);
        for (int i = 0; i < 32; i++) {
          Mine& m = *static_cast<Mine*>(lanes[i]);
          for (int matrix = 0; matrix < 4; matrix++) {
            uint16_t pair[2];
            for (int e = 0; e < 2; e++) {
              const int down = i / 4, across = 2 * (i % 4) + e;
              pair[e] =
                  m.transposed ? rows[8 * matrix + across][down] : rows[8 * matrix + down][across];
            }
            std::memcpy(&m.r[matrix], pair, 4);
          }
        }
      },
      place);
}

namespace {

float element(int kind, uint32_t bits, int half) {
  if (kind == 2) return std::bit_cast<float>(bits & 0xffffe000u);
  const auto h = static_cast<uint16_t>(bits >> 16 * half);
  return kind == 1 ? float_of_half(h) : std::bit_cast<float>(uint32_t{h} << 16);
}

}  // namespace

void multiply_accumulate(int kind, float* c, const uint32_t* a, const uint32_t* b, Place place) {
  struct Mine {
    int kind;
    float* c;
    const uint32_t *a, *b;
  } mine{kind, c, a, b};
  together(
      &mine,
      [](void* const* lanes) {
        counters().products++;
        const auto& at = [&](int lane) -> Mine& { return *static_cast<Mine*>(lanes[lane]); };
        const int kind = at(0).kind, depth = kind == 2 ? 8 : 16;
        float a[16][16], b[16][8];
        for (int i = 0; i < 32; i++) {
          const int g = i / 4, t = i % 4;
          for (int r = 0; r < 4; r++) {
            const int row = g + 8 * (r % 2);
            if (kind == 2) {
              a[row][t + 4 * (r / 2)] = element(kind, at(i).a[r], 0);
            } else {
              for (int e = 0; e < 2; e++)
                a[row][2 * t + e + 8 * (r / 2)] = element(kind, at(i).a[r], e);
            }
          }
          for (int r = 0; r < 2; r++) {
            if (kind == 2) {
              b[t + 4 * r][g] = element(kind, at(i).b[r], 0);
            } else {
              for (int e = 0; e < 2; e++) b[2 * t + e + 8 * r][g] = element(kind, at(i).b[r], e);
            }
          }
        }
        for (int i = 0; i < 32; i++) {
          for (int e = 0; e < 4; e++) {
            const int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
            float sum = at(i).c[e];
            for (int k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
            at(i).c[e] = sum;
          }
        }
      },
      place);
}

void* shared_array(int index, int64_t bytes, int64_t reserved) {
  if (index < static_cast<int>(block.arrays.size())) {
    if (block.arrays[index].second != bytes)
      fail("threads ask for shared memory in different orders");
    return block.arrays[index].first.get();
  }
  block.reserved += reserved;
  if (block.reserved > block.grid->shared_bytes) {
    fail("the block takes " + std::to_string(block.reserved) +
         " bytes of shared memory, launched with " + std::to_string(block.grid->shared_bytes));
  }
  // Exactly these bytes, starting at bank 0.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<int64_t>(bytes, 1)) != 0) fail("out of memory");
  std::memset(memory, 0xff, bytes);
  block.arrays.emplace_back(std::unique_ptr<void, decltype(&std::free)>(memory, std::free), bytes);
  return memory;
}

void copy_async(void* shared, const void* global, int bytes, bool valid, Place place) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes ||
      (valid && reinterpret_cast<uintptr_t>(global) % bytes)) {
    fail("copy not aligned at " + text(place));
  }
  if (valid) global_access(global, bytes, false, place);
  if (settings().count) record(shared, bytes, true, place);
  const Copy copy{shared, global, bytes, valid};
  if (block.random.chance(kEager)) {
    copy.land();
  } else {
    block.running->groups.back().push_back(copy);
  }
}

void copy_async_commit() { block.running->groups.emplace_back(); }

void copy_async_wait(int groups) {
  auto& pending = block.running->groups;
  while (static_cast<int>(pending.size()) - 1 > groups) {
    for (const Copy& copy : pending.front()) copy.land();
    pending.pop_front();
  }
}

void global_access(const void* p, int bytes, bool is_store, Place place) {
  (is_store ? counters().global_stores : counters().global_loads) += bytes;
  if (settings().count) record(p, bytes, false, place);
}
void shared_access(const void* p, int bytes, Place place) {
  if (settings().count) record(p, bytes, true, place);
}

uint16_t bfloat16_of(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t half_of(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float float_of_half(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
uint32_t tf32_of(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x - x != 0 ? bits : (bits + 0x1000) & 0xffffe000u;
}

}  // namespace dense_ext::emulator
