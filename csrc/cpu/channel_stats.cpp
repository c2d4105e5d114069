// mean[c], var[c] = mean and biased variance of x[..., c].
//
// x [N, H, W, C] with any pixel stride; mean, var [C]. Moves C elements per pixel: every tile is
// read once from memory, and a second time from the cache for the squared deviations.

#include <torch/csrc/stable/library.h>

#include "../primitives.h"
#include "reduce.h"

namespace dense_ext {
namespace {

constexpr int64_t kTileBytes = 256 << 10;

template <class T>
void channel_stats_kernel(const Pixels<const T>& x, Acc<T>* mean, Acc<T>* var) {
  const int64_t row_bytes = x.channels * int64_t{sizeof(T)};
  const Tiles tiles(x.count(), std::max<int64_t>(1, kTileBytes / row_bytes), num_threads());
  Workspace workspace{Moments::bytes(tiles.parts, x.channels)};
  Moments moments(workspace, tiles.parts, x.channels);
  parallel(tiles.parts, [&](int64_t part) {
    moments.clear(part);
    const Range range = tiles.of_part(part);
    for (int64_t i = range.begin; i < range.end; i++) {
      const Range tile = tiles.tile(i);
      moments.add_rows(part, x.at(tile.begin), x.stride, tile.size());
    }
  });
  moments.finish(mean, var);
}

}  // namespace

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  dispatch(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto xs = pixels<const T>(x, "x");
    A* means = channels<A>(mean, "mean", xs.channels);
    A* vars = channels<A>(var, "var", xs.channels);
    if (x.numel() == 0) {
      std::fill_n(means, xs.channels, A{0});
      std::fill_n(vars, xs.channels, A{0});
      return;
    }
    channel_stats_kernel<T>(xs, means, vars);
  });
}

STABLE_TORCH_LIBRARY_IMPL(DENSE_EXT_NAMESPACE, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
}

}  // namespace dense_ext
