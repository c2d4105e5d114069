// AMX's tile instructions in plain C++, for tests on processors without them. A compiler includes
// this file before a source.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t data[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void require(bool holds) {
  if (!holds) std::abort();
}

// LDTILECFG: zeroes all tiles.
inline void load_config(const void* memory) {
  const auto* config = static_cast<const uint8_t*>(memory);
  require(config[0] == 1 && config[1] == 0);
  for (int i = 2; i < 16; i++) require(config[i] == 0);
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, sizeof row_bytes);
    const uint8_t rows = config[48 + i];
    require(rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0 && (rows == 0) == (row_bytes == 0));
    tiles[i] = {};
    tiles[i].rows = rows;
    tiles[i].row_bytes = row_bytes;
  }
  configured = true;
}

inline void release() { configured = false; }

inline Tile& tile(int i) {
  require(configured && i >= 0 && i < 8 && tiles[i].rows > 0);
  return tiles[i];
}

inline void zero(int i) { std::memset(tile(i).data, 0, sizeof tile(i).data); }

inline void load(int i, const void* memory, int64_t stride) {
  zero(i);
  for (int r = 0; r < tile(i).rows; r++) {
    std::memcpy(tile(i).data[r], static_cast<const char*>(memory) + r * stride, tile(i).row_bytes);
  }
}

inline void store(int i, void* memory, int64_t stride) {
  for (int r = 0; r < tile(i).rows; r++) {
    std::memcpy(static_cast<char*>(memory) + r * stride, tile(i).data[r], tile(i).row_bytes);
  }
}

inline float widened(const uint8_t* data, int index) {
  uint16_t value;
  std::memcpy(&value, data + 2 * index, sizeof value);
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// TDPBF16PS: the even and the odd products of a row are summed apart.
inline void multiply_add(int c_index, int a_index, int b_index) {
  Tile &c = tile(c_index), &a = tile(a_index), &b = tile(b_index);
  require(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
  for (int m = 0; m < c.rows; m++) {
    for (int n = 0; n < c.row_bytes / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < b.rows; k++) {
        even += widened(a.data[m], 2 * k) * widened(b.data[k], 2 * n);
        odd += widened(a.data[m], 2 * k + 1) * widened(b.data[k], 2 * n + 1);
      }
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum += even + odd;
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace emulated_amx

#define DENSE_EXT_EMULATED_AMX

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply_add
