// Matrix products over panels for one instruction set, on the tiles of likelihood/tile.h.

#include "likelihood/tile.h"

namespace fastmem {
namespace {

// Calls finish(m, j, sum over k < steps of a[m, k] * b[k, vector j]) for m < rows and j < J. Rows
// of b lie `b_stride` apart. kAlong: a lies along k, with rows `stride` apart; else along m.
template <bool kAlong, std::size_t J, class F>
inline void narrow_product(const float* a, std::size_t stride, std::size_t rows, const float* b,
                           std::size_t b_stride, std::size_t steps, const F& finish) {
  in_tiles(rows, [&](auto m_all, std::size_t first) {
    constexpr std::size_t M = decltype(m_all)::value;
    Vec sum[M][J];
    clear(sum);
    multiply<kAlong>(a + first * (kAlong ? stride : 1), stride, b, b_stride, steps, sum);
#pragma GCC unroll 8
    for (std::size_t m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (std::size_t j = 0; j < J; ++j) finish(first + m, j, sum[m][j]);
  });
}

// The same for j < vecs, at most kVecs at a time.
template <bool kAlong, class F>
inline void product(const float* a, std::size_t stride, std::size_t rows, const float* b,
                    std::size_t b_stride, std::size_t vecs, std::size_t steps, const F& finish) {
  std::size_t some;
  for (std::size_t v = 0; v < vecs; v += some) {
    const std::size_t pieces = (vecs - v + kVecs - 1) / kVecs;
    some = (vecs - v + pieces - 1) / pieces;
    with_vecs(some, [&](auto j_all) {
      narrow_product<kAlong, decltype(j_all)::value>(
          a, stride, rows, b + v * kLanes, b_stride, steps,
          [&](std::size_t m, std::size_t j, Vec sum) { finish(m, v + j, sum); });
    });
  }
}

// Calls finish(row, j, weight (rows, columns) times in, plus bias).
template <class F>
inline void linear(const Net& net, const float* parameters, const GptTensor& weight,
                   const GptTensor& bias, const float* in, const F& finish) {
  const float* const b = parameters + bias.at;
  product<true>(
      parameters + weight.at, weight.columns, weight.rows, in, net.lanes, net.lanes / kLanes,
      weight.columns,
      [&](std::size_t row, std::size_t j, Vec sum) { finish(row, j, sum + Vec::all(b[row])); });
}

// Calls finish(column, j, weight^T times dout), the gradient of linear's `in`.
template <class F>
inline void linear_back(const Net& net, const float* parameters, const GptTensor& weight,
                        const float* dout, const F& finish) {
  product<false>(parameters + weight.at, weight.columns, weight.columns, dout, net.lanes,
                 net.lanes / kLanes, weight.rows, finish);
}

// out (kLanes, kLanes) = transpose of in (rows, kLanes), with zeros for missing rows.
inline void transpose_tile(const float* in, std::size_t stride, std::size_t rows, float* out,
                           std::size_t out_stride) {
  transpose([&](std::size_t i) { return i < rows ? Vec::load(in + i * stride) : Vec::all(0); },
            out, out_stride);
}

// sums += in (rows, lanes), a vector for each row.
inline void add_lanes_of(const float* in, std::size_t rows, std::size_t lanes, float* sums) {
  for (std::size_t row = 0; row < rows; ++row) {
    Vec sum = Vec::load(sums + row * kLanes);
    for (std::size_t lane = 0; lane < lanes; lane += kLanes)
      sum = sum + Vec::load(in + row * lanes + lane);
    sum.store(sums + row * kLanes);
  }
}

// sums += gradients of weight and bias, given `dout`, the gradient of linear's result. `across` is
// room for in^T, (lanes, weight.stride).
inline void linear_gradients(const Net& net, const GptTensor& weight, const GptTensor& bias,
                             const float* dout, const float* in, float* across, float* sums) {
  const std::size_t stride = weight.stride;
  for (std::size_t lane = 0; lane < net.lanes; lane += kLanes)
    for (std::size_t k = 0; k < weight.columns; k += kLanes)
      transpose_tile(in + k * net.lanes + lane, net.lanes, std::min(kLanes, weight.columns - k),
                     across + lane * stride + k, stride);
  float* const out = sums + weight.sum_at;
  product<true>(dout, net.lanes, weight.rows, across, stride, stride / kLanes, net.lanes,
                [&](std::size_t row, std::size_t j, Vec sum) {
                  float* const to = out + row * stride + j * kLanes;
                  (Vec::load(to) + sum).store(to);
                });
  add_lanes_of(dout, weight.rows, net.lanes, sums + bias.sum_at);
}

}  // namespace
}  // namespace fastmem
