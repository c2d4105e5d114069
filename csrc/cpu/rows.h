// The elementwise and reducing loops over rows of pixels before and after the matrix products.
//
// Rows of T are in tensors: they have a pixel stride and exactly `columns` values. Rows of Acc<T>
// and of Operand<T> are in scratch: they have a leading dimension and can be written up to a whole
// vector. Per-channel vectors are padded with zeros, so whole vectors can be loaded from them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vector.h"

namespace dense_ext {

// The dimension of an operand's rows that a product sums over. A pair holds two columns of a row,
// or two rows of a column; a last row or column without a partner has zeros beside it.
enum class Depth { kColumns, kRows };

// Writes an operand; value(r, j, count) is the vector at row r and columns from j on. Its rows, or
// pairs of rows, are `ld` elements apart.
template <Depth kDepth, class T, class E, class Value>
void write_operand(int64_t rows, int64_t columns, E* out, int64_t ld, const Value& value) {
  if constexpr (kIsPair<E> && kDepth == Depth::kRows) {
    for (int64_t r = 0; r < rows; r += 2, out += ld) {
      for_vectors<T>(columns, [&](int64_t j, auto count) {
        const Vector<T> second = r + 1 < rows ? value(r + 1, j, count) : Vector<T>{};
        store(out + j, pairs_of(value(r, j, count), second));
      });
    }
  } else {
    using Stored = std::conditional_t<kIsPair<E>, BFloat16, E>;
    for (int64_t r = 0; r < rows; r++, out += ld) {
      for_vectors<T>(columns, [&](int64_t j, auto count) {
        store(reinterpret_cast<Stored*>(out) + j, value(r, j, count));
      });
    }
  }
}

// out = relu(scale*x + shift)
template <Depth kDepth, class E, class T>
void activate_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, const Acc<T>* scale,
                   const Acc<T>* shift, E* out, int64_t ld) {
  write_operand<kDepth, T>(rows, columns, out, ld, [&](int64_t r, int64_t j, auto count) {
    return relu(load(scale + j) * load(x + r * stride + j, count) + load(shift + j));
  });
}

// out = factor*x
template <class T>
void scale_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, Acc<T> factor,
                Operand<T>* out, int64_t ld) {
  write_operand<Depth::kColumns, T>(rows, columns, out, ld, [&](int64_t r, int64_t j, auto count) {
    return load(x + r * stride + j, count) * factor;
  });
}

// u*y + v, and v where u is zero. Norms with fixed statistics have u = 0, and then a y that isn't
// finite does not make the gradient NaN.
template <class V>
V affine(V u, V y, V v) {
  return u != 0 ? u * y + v : v;
}

// out = p*grad + u*y + v, where p is 1 if null
template <class T>
void affine_rows(const T* grad, int64_t grad_stride, const T* y, int64_t y_stride, int64_t rows,
                 int64_t columns, const Acc<T>* p, const Acc<T>* u, const Acc<T>* v,
                 Operand<T>* out, int64_t ld) {
  write_operand<Depth::kColumns, T>(rows, columns, out, ld, [&](int64_t r, int64_t j, auto count) {
    const Vector<T> loaded = load(grad + r * grad_stride + j, count);
    const Vector<T> g = p ? load(p + j) * loaded : loaded;
    return g + affine(load(u + j), load(y + r * y_stride + j, count), load(v + j));
  });
}

// Turns an operand whose depth is its columns into one whose depth is its rows. Row i of `out`
// holds the pairs of rows i*step and i*step + 1 of `in`. Elements that are not pairs stay as they
// are: `out` is `in`, from rows_operand.
template <class E>
void pair_rows(const E* in, int64_t in_ld, int64_t rows, int64_t columns, int64_t step, E* out,
               int64_t out_ld) {
  if constexpr (kIsPair<E>) {
    const auto load_words = [](const E* row, int64_t j) {
      return __builtin_convertvector(load_raw(reinterpret_cast<const BFloat16*>(row) + j, Full{}),
                                     Bits);
    };
    for (int64_t r = 0; r < rows; r += step, in += step * in_ld, out += out_ld) {
      for (int64_t j = 0; j < columns; j += kLanes<float>) {
        const Bits second = r + 1 < rows ? load_words(in + in_ld, j) : Bits{};
        store(out + j, load_words(in, j) | second << 16);
      }
    }
  }
}

// out = values, rounded to T
template <class T>
void store_rows(const Acc<T>* values, int64_t ld, int64_t rows, int64_t columns, T* out,
                int64_t stride) {
  for (int64_t r = 0; r < rows; r++, values += ld, out += stride) {
    for_vectors<T>(columns,
                   [&](int64_t j, auto count) { store(out + j, load(values + j), count); });
  }
}

// The same; also leaves the rounded values in `values`.
template <class T>
void store_rounded_rows(Acc<T>* values, int64_t ld, int64_t rows, int64_t columns, T* out,
                        int64_t stride) {
  for (int64_t r = 0; r < rows; r++, values += ld, out += stride) {
    for_vectors<T>(columns, [&](int64_t j, auto count) {
      const Raw<T> raw = narrow<T>(load(values + j));
      store_raw(out + j, raw, count);
      if constexpr (sizeof(T) < sizeof(Acc<T>)) store(values + j, widen<T>(raw));
    });
  }
}

// values = values, rounded to T
template <class T>
void round_rows(Acc<T>* values, int64_t ld, int64_t rows, int64_t columns) {
  if constexpr (sizeof(T) < sizeof(Acc<T>)) {
    for (int64_t r = 0; r < rows; r++, values += ld) {
      for_vectors<T>(columns, [&](int64_t j, auto) {
        store(values + j, widen<T>(narrow<T>(load(values + j))));
      });
    }
  }
}

// The rows that are summed in the accumulation type before the sum is added in double. A serial sum
// of so few float32 values is off by hardly more than its last bit.
constexpr int64_t kRunRows = 16;

// total[i] += sums[i], lane by lane
template <class T, int kWidth>
void add_lanes(const Vector<T> (&sums)[kWidth], double* total) {
  alignas(64) Acc<T> flat[kWidth * kLanes<T>];
  std::memcpy(flat, sums, sizeof flat);
  for (int64_t i = 0; i < kWidth * kLanes<T>; i++) total[i] += flat[i];
}

// The moments of one column, in double alone.
template <class T>
void moments_of_column(const T* x, int64_t stride, int64_t rows, double* mean, double* m2) {
  const auto value = [&](int64_t r) -> double { return load(x + r * stride, int64_t{1})[0]; };
  double sum = 0, square = 0;
  for (int64_t r = 0; r < rows; r++) sum += value(r);
  *mean = sum / rows;
  for (int64_t r = 0; r < rows; r++) {
    const double d = value(r) - *mean;
    square += d * d;
  }
  *m2 = square;
}

// mean and m2 = sum (x - mean)^2 of each column, by two passes over rows that are in the cache. The
// second pass also sums x - mean: were the first pass's mean exact, that would be zero. It corrects
// both, as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983). The
// first pass's error must stay small: with a thousand rows it is some hundred roundings at most.
// Whole vectors are written to mean and m2.
template <class T>
void moments_of_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, double* mean,
                     double* m2) {
  using V = Vector<T>;
  const double inverse = 1.0 / rows;
  bool finite = true;
  for_blocks<T>(columns, [&](int64_t j, auto width, auto count) {
    constexpr int kWidth = decltype(width)::value;
    constexpr int64_t kColumns = kWidth * kLanes<T>;
    const auto value = [&](int64_t r, int i) {
      return load(x + r * stride + j + i * kLanes<T>, count);
    };
    V mean_of[kWidth] = {};
    for (int64_t r = 0; r < rows; r++) {
      DENSE_UNROLL for (int i = 0; i < kWidth; i++) mean_of[i] += value(r, i);
    }
    DENSE_UNROLL for (int i = 0; i < kWidth; i++) mean_of[i] *= static_cast<Acc<T>>(inverse);
    alignas(64) double sums[kColumns] = {}, squares[kColumns] = {};
    for (int64_t begin = 0; begin < rows; begin += kRunRows) {
      V sum[kWidth] = {}, square[kWidth] = {};
      for (int64_t r = begin; r < std::min(begin + kRunRows, rows); r++) {
        DENSE_UNROLL for (int i = 0; i < kWidth; i++) {
          const V d = value(r, i) - mean_of[i];
          sum[i] += d;
          square[i] += d * d;
        }
      }
      add_lanes<T>(sum, sums);
      add_lanes<T>(square, squares);
    }
    alignas(64) Acc<T> first[kColumns];
    std::memcpy(first, mean_of, sizeof first);
    for (int64_t i = 0; i < kColumns; i++) {
      const double correction = sums[i] * inverse, corrected = squares[i] - sums[i] * correction;
      mean[j + i] = first[i] + correction;
      finite &= corrected <= std::numeric_limits<double>::max();
      m2[j + i] = corrected < 0 ? 0 : corrected;  // NaN stays NaN
    }
  });
  // A sum of large values may overflow float32 where the moments do not.
  for (int64_t c = 0; c < columns && !finite; c++) {
    if (!std::isfinite(m2[c])) moments_of_column(x + c, stride, rows, mean + c, m2 + c);
  }
}

// How mask_rows writes g.
enum class Output {
  kAddScaled,    // out += scale*g
  kWriteScaled,  // out = scale*g
  kWrite,        // out = g
};

// g = grad where scale*x + shift > 0, else 0. Writes `out`, and adds the rows' sum g and
// sum g*(x - mean) to sums[0][...] and sums[1][...], which are `sums_ld` apart. Row r of x uses row
// r / kShared of grad: kShared is 2 if two pixels of a pooling window share one gradient.
template <Output kOutput, int kShared, class T>
void mask_rows(const Acc<T>* grad, int64_t ld, const T* x, int64_t x_stride, int64_t rows,
               int64_t columns, const Acc<T>* mean, const Acc<T>* scale, const Acc<T>* shift,
               T* out, int64_t out_stride, double* sums, int64_t sums_ld) {
  using V = Vector<T>;
  for_blocks<T>(columns, [&](int64_t j0, auto width, auto count) {
    constexpr int kWidth = decltype(width)::value;
    V sum_g[kWidth] = {}, sum_gx[kWidth] = {}, means[kWidth], scales[kWidth], shifts[kWidth];
    DENSE_UNROLL for (int i = 0; i < kWidth; i++) {
      means[i] = load(mean + j0 + i * kLanes<T>);
      scales[i] = load(scale + j0 + i * kLanes<T>);
      shifts[i] = load(shift + j0 + i * kLanes<T>);
    }
    for (int64_t r = 0; r < rows; r++) {
      DENSE_UNROLL for (int i = 0; i < kWidth; i++) {
        const int64_t j = j0 + i * kLanes<T>;
        const V xv = load(x + r * x_stride + j, count);
        const V g = relu_mask(scales[i] * xv + shifts[i], load(grad + r / kShared * ld + j));
        T* o = out + r * out_stride + j;
        if constexpr (kOutput == Output::kAddScaled) {
          store(o, load(o, count) + scales[i] * g, count);
        } else {
          store(o, kOutput == Output::kWrite ? g : scales[i] * g, count);
        }
        sum_g[i] += g;
        sum_gx[i] += g * (xv - means[i]);
      }
    }
    add_lanes<T>(sum_g, sums + j0);
    add_lanes<T>(sum_gx, sums + sums_ld + j0);
  });
}

}  // namespace dense_ext
