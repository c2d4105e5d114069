// The product of pairs in AMX's tiles: 16 x 16 float32, 16 rows of 16 pairs of a, 16 x 16 pairs of
// b.
//
// Two tiles of a and two of b make four of C, which are all eight. A tile of a has the rows of the
// product; the depth and the columns are whole tiles. If the depth is not, or if a is not dense
// along it, both operands are first copied, with zeros at the end.
//
// It is compiled for every processor with AVX512-BF16, and chosen when it runs. No processor with
// AMX has run it: tests run it on an emulation of the instructions (tests/cpu/emulated_amx.h).

#pragma once

#if defined(__AVX512BF16__) && defined(__linux__)
#define DENSE_EXT_AMX
#endif

#if defined(DENSE_EXT_AMX)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm.h"
#include "parallel.h"

#define DENSE_EXT_WITH_TILES __attribute__((target("amx-tile,amx-bf16")))

namespace dense_ext::amx {

// Whether the processor has the instructions and Linux lets this process use the tiles.
inline bool is_here() {
  static const bool found = [] {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}

constexpr int64_t kTile = 16;  // rows, columns, and pairs of the depth

// As LDTILECFG reads it. Tiles 0 to 3 are C, by rows; 4 and 5 are a; 6 and 7 are b.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For a product of up to two tiles of rows.
  explicit TileConfig(int64_t count) {
    const auto upper = static_cast<uint8_t>(count < kTile ? count : kTile);
    const auto lower = static_cast<uint8_t>(count - upper);
    const uint8_t heights[] = {upper, upper, lower, lower, upper, lower, kTile, kTile};
    for (int i = 0; i < 8; i++) {
      rows[i] = heights[i];
      row_bytes[i] = heights[i] ? 4 * kTile : 0;
    }
  }
};

// Adds up a product of up to 32 rows and kVectors vectors of columns; writes it to c.
template <bool kTwo, int kVectors>
DENSE_EXT_WITH_TILES void tile_kernel(const Product<Pair>& p, const Pair* a, const Pair* b,
                                      float* c, int64_t c_row) {
  const int64_t a_bytes = 4 * p.a_row, b_bytes = 4 * p.b_depth, lower = kTile * p.a_row;
  _tile_zero(0);
  if constexpr (kVectors > 1) _tile_zero(1);
  if constexpr (kTwo) _tile_zero(2);
  if constexpr (kTwo && kVectors > 1) _tile_zero(3);
  for (int64_t tap = 0; tap < p.taps; tap++) {
    const Pair* at = a + (p.a_taps ? p.a_taps[tap] : 0);
    const Pair* bt = b + (p.b_taps ? p.b_taps[tap] : 0);
    for (int64_t k = 0; k < p.depth; k += kTile, at += kTile, bt += kTile * p.b_depth) {
      _tile_loadd(4, at, a_bytes);
      _tile_loadd(6, bt, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwo) {
        _tile_loadd(5, at + lower, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kVectors > 1) {
        _tile_loadd(7, bt + kTile, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwo) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, 4 * c_row);
  if constexpr (kVectors > 1) _tile_stored(1, c + kTile, 4 * c_row);
  if constexpr (kTwo) _tile_stored(2, c + kTile * c_row, 4 * c_row);
  if constexpr (kTwo && kVectors > 1) _tile_stored(3, c + kTile * c_row + kTile, 4 * c_row);
}

// One tap of whole tiles, dense along the depth, in place of any product.
class WholeTiles {
 public:
  explicit WholeTiles(const Product<Pair>& p)
      : source_(p), depth_(round_up(p.taps * p.depth, kTile)), whole_(p) {
    if (p.depth % kTile == 0 && p.a_depth == 1) return;
    a_ = scratch<Pair>(Slot::kTilesOfA, round_up(p.rows, kTile) * depth_);
    b_ = scratch<Pair>(Slot::kTilesOfB, depth_ * kPanel<Pair>);
    copy_a();
    whole_.depth = depth_;
    whole_.a = a_;
    whole_.a_row = depth_;
    whole_.b_depth = kPanel<Pair>;
    whole_.taps = 1;
    whole_.a_taps = whole_.b_taps = nullptr;
  }

  const Product<Pair>& product() const { return whole_; }

  // The panel of b that begins at `panel`.
  const Pair* b(const Pair* panel) {
    if (!b_) return panel;
    Pair* out = b_;
    for (int64_t tap = 0; tap < source_.taps; tap++) {
      const Pair* in = panel + (source_.b_taps ? source_.b_taps[tap] : 0);
      for (int64_t k = 0; k < source_.depth; k++, in += source_.b_depth, out += kPanel<Pair>) {
        store(out, load(in));
        store(out + kTile, load(in + kTile));
      }
    }
    std::fill(out, b_ + depth_ * kPanel<Pair>, Pair{});
    return b_;
  }

 private:
  // a's rows are dense along the depth, or each step of the depth is dense along the rows.
  void copy_a() {
    if (source_.a_depth != 1) return transpose_a();
    for (int64_t row = 0; row < source_.rows; row++) {
      Pair* out = a_ + row * depth_;
      for (int64_t tap = 0; tap < source_.taps; tap++) {
        out = std::copy_n(a_of(tap) + row * source_.a_row, source_.depth, out);
      }
      std::fill(out, a_ + (row + 1) * depth_, Pair{});
    }
  }

  void transpose_a() {
    for (int64_t row = 0; row < source_.rows; row += kTile) {
      const int64_t rows = std::min(kTile, source_.rows - row);
      Vector<Pair> block[kTile] = {};
      int64_t filled = 0, written = 0;
      const auto flush = [&] {
        transpose<Pair>(block);
        for (int64_t r = 0; r < rows; r++) store(a_ + (row + r) * depth_ + written, block[r]);
        std::fill_n(block, kTile, Vector<Pair>{});
        written += kTile;
        filled = 0;
      };
      for (int64_t tap = 0; tap < source_.taps; tap++) {
        const Pair* in = a_of(tap) + row;
        for (int64_t k = 0; k < source_.depth; k++, in += source_.a_depth) {
          block[filled++] = load(in, rows);
          if (filled == kTile) flush();
        }
      }
      if (filled > 0) flush();
    }
  }

  const Pair* a_of(int64_t tap) const {
    return source_.a + (source_.a_taps ? source_.a_taps[tap] : 0);
  }

  const Product<Pair>& source_;
  const int64_t depth_;
  Product<Pair> whole_;
  Pair *a_ = nullptr, *b_ = nullptr;
};

DENSE_EXT_WITH_TILES inline void multiply(const Product<Pair>& source) {
  WholeTiles tiles(source);
  const Product<Pair>& p = tiles.product();
  const int64_t groups = ceil_div(p.rows, 2 * kTile);
  const int64_t steps = groups * ceil_div(p.columns, kPanel<Pair>);
  alignas(64) float sum[2 * kTile * kPanel<Pair>];
  int64_t step = 0, configured = 0;
  for (int64_t j = 0; j < p.columns; j += kPanel<Pair>) {
    const bool wide = p.columns - j > kTile;
    const Pair* b = tiles.b(p.b + j / kPanel<Pair> * p.b_panel);
    for (int64_t g = 0; g < groups; g++) {  // their sizes differ by at most one
      const Range rows = part_of(p.rows, groups, g);
      for (const Prefetch& each : p.prefetch) each.fetch(step, steps);
      step++;
      if (rows.size() != configured) {
        const TileConfig config(rows.size());
        _tile_loadconfig(&config);
        configured = rows.size();
      }
      const Pair* a = p.a + rows.begin * p.a_row;
      float* target = p.c + rows.begin * p.c_row + j;
      float* c = p.accumulate ? sum : target;
      const int64_t c_row = p.accumulate ? kPanel<Pair> : p.c_row;
      const auto kernel = rows.size() > kTile
                              ? (wide ? tile_kernel<true, 2> : tile_kernel<true, 1>)
                              : (wide ? tile_kernel<false, 2> : tile_kernel<false, 1>);
      kernel(p, a, b, c, c_row);
      for (int64_t r = 0; p.accumulate && r < rows.size(); r++) {
        for (int64_t v = 0; v < (wide ? 2 : 1); v++) {
          float* out = target + r * p.c_row + v * kTile;
          store(out, load(sum + r * kPanel<Pair> + v * kTile) + load(out));
        }
      }
    }
  }
  _tile_release();
}

}  // namespace dense_ext::amx

#endif
