// Compares products of pairs of bfloat16 with a plain loop. Prints a line for each product that
// differs, and ends with 1 if any does. DENSE_EXT_TESTED is what is tested: csrc/cpu/gemm.cpp, or
// amx.h on emulated instructions.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include DENSE_EXT_TESTED

namespace {

using dense_ext::BFloat16;
using dense_ext::Pair;
using dense_ext::Product;

constexpr int64_t kPanel = dense_ext::kPanel<Pair>;

#if defined(DENSE_EXT_EMULATED_AMX)
constexpr auto multiply = dense_ext::amx::multiply;
#else
constexpr auto multiply = dense_ext::multiply<Pair>;
#endif

struct Case {
  int64_t rows, columns, depth, taps;
  bool transposed, accumulate;
};

std::mt19937 generator(0);

std::vector<Pair> random_pairs(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<Pair> pairs(count);
  for (Pair& p : pairs) p = {BFloat16(normal(generator)), BFloat16(normal(generator))};
  return pairs;
}

bool differs(const Case& c) {
  // Rows of a are a little apart, and taps begin anywhere.
  const int64_t length = c.transposed ? c.rows + 5 : c.depth + 7;
  const int64_t lines = c.transposed ? c.depth : c.rows;
  const int64_t panels = dense_ext::ceil_div(c.columns, kPanel), tap_size = c.depth * kPanel;
  std::vector<int64_t> a_taps, b_taps;
  for (int64_t t = 0; t < c.taps; t++) {
    a_taps.push_back(t * (c.transposed ? lines * length : 3));
    b_taps.push_back((c.taps - 1 - t) * tap_size);
  }
  const auto a = random_pairs(a_taps.back() + lines * length);
  const auto b = random_pairs(panels * c.taps * tap_size);
  const int64_t c_row = panels * kPanel + 3;
  std::vector<float> out(c.rows * c_row, 2.0f);
  Product<Pair> product{.rows = c.rows,
                        .columns = c.columns,
                        .depth = c.depth,
                        .a = a.data(),
                        .a_row = c.transposed ? 1 : length,
                        .a_depth = c.transposed ? length : 1,
                        .b = b.data(),
                        .b_panel = c.taps * tap_size,
                        .b_depth = kPanel,
                        .c = out.data(),
                        .c_row = c_row,
                        .accumulate = c.accumulate,
                        .taps = c.taps,
                        .a_taps = a_taps.data(),
                        .b_taps = b_taps.data()};
  if (c.taps == 1) product.a_taps = product.b_taps = nullptr;
  multiply(product);
  const int64_t written = dense_ext::round_up(c.columns, dense_ext::kLanes<Pair>);
  for (int64_t i = 0; i < c.rows; i++) {
    for (int64_t j = 0; j < c_row; j++) {
      double sum = c.accumulate || j >= written ? 2.0 : 0.0, size = 2.0;
      for (int64_t t = 0; t < c.taps && j < written; t++) {
        for (int64_t k = 0; k < c.depth; k++) {
          const Pair x = a[a_taps[t] + i * product.a_row + k * product.a_depth];
          const Pair y = b[j / kPanel * product.b_panel + b_taps[t] + k * kPanel + j % kPanel];
          const double first = double(float(x.first)) * float(y.first);
          const double second = double(float(x.second)) * float(y.second);
          sum += first + second;
          size += std::abs(first) + std::abs(second);
        }
      }
      if (!(std::abs(out[i * c_row + j] - sum) <= 1e-6 * size)) return true;
    }
  }
  return false;
}

}  // namespace

int main() {
  int failures = 0;
  for (int64_t rows : {1, 16, 17, 33, 45}) {
    for (int64_t columns : {1, 16, 20, 48, 80}) {
      for (int64_t depth : {1, 16, 21, 40}) {
        for (int64_t taps : {1, 9}) {
          for (int options = 0; options < 4; options++) {
            const Case c{rows, columns, depth, taps, (options & 1) != 0, (options & 2) != 0};
            if (!differs(c)) continue;
            std::printf(
                "rows %ld, columns %ld, depth %ld, taps %ld, transposed %d, accumulate %d\n",
                c.rows, c.columns, c.depth, c.taps, c.transposed, c.accumulate);
            failures++;
          }
        }
      }
    }
  }
  return failures > 0;
}
