// Integer ranges and their near-equal parts.

#pragma once

#include <cstdint>

namespace dense_ext {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {
  int64_t begin, end;
  constexpr int64_t size() const { return end - begin; }
};

// Part number `index` of `parts` near-equal parts of [0, total).
constexpr Range part_of(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}

}  // namespace dense_ext
