// fastmem._core's sequences and orders: see fastmem/_core.pyi.

#include <algorithm>

#include "sequences/order.h"
#include "sequences/philox.h"
#include "sequences/sequences.h"
#include "shared/bind.h"

namespace binding {
namespace {

void check_apart(const py::array& out, const py::array& read, const std::string& name) {
  if (overlap(out, read))
    fail("out and " + name + " must not share memory; make out with numpy.empty");
}

// The n items begin, begin + 1, ... must end at `last`.
void check_range(std::uint64_t begin, std::uint64_t n, std::uint64_t last) {
  if (n != 0 && (begin > last || n - 1 > last - begin))
    fail("begin + len(out) - 1 must be at most " + to_string(last) + ", got begin = " +
         to_string(begin) + " and len(out) = " + to_string(n) + "; ask for fewer or begin earlier");
}

// Cumulative weights start at 0 and never decrease.
const std::uint32_t* cumulative_weights(const py::array& cumulative, std::uint64_t vocab,
                                        const py::array& out) {
  check_array(cumulative, "cumulative", 1);
  check_type<std::uint32_t>(cumulative, "cumulative", "uint32");
  const auto n = static_cast<std::uint64_t>(cumulative.shape(0));
  if (n != vocab)
    fail("cumulative must have vocab entries, got " + to_string(n) + " for vocab " +
         to_string(vocab) + "; leave out the last sum, 2**32");
  check_apart(out, cumulative, "cumulative");
  const auto* const c = static_cast<const std::uint32_t*>(cumulative.data());
  if (c[0] != 0)
    fail("cumulative[0] must be 0, got " + to_string(c[0]) + "; put a 0 before the sums");
  if (const auto* const down = std::is_sorted_until(c, c + n); down != c + n)
    fail("cumulative must not decrease, got " + to_string(down[-1]) + " before " +
         to_string(*down) + " at " + to_string(down - c) +
         "; sum weights that are not negative, and drop tokens of weight 0 at the end");
  return c;
}

fastmem::TokenRule token_rule(const py::array& out, std::uint64_t seed, std::uint64_t vocab,
                              std::uint64_t threads, const Array& cumulative) {
  check_array(out, "out", 2);
  check_writeable(out, "out");
  const auto length = static_cast<std::uint64_t>(out.shape(1));
  check_limits("out.shape[1], the length of a sequence,", length, 1, fastmem::kMaxLength);
  check_limits("vocab", vocab, 1, cumulative ? fastmem::kMaxWeights : fastmem::kMaxVocab);
  check_limits("threads", threads, 1, UINT64_MAX);
  return {seed, length, static_cast<std::uint32_t>(vocab),
          cumulative ? cumulative_weights(*cumulative, vocab, out) : nullptr};
}

// Calls f(tokens) with a pointer of out's type, after releasing the GIL.
template <class F>
void without_gil(py::array& out, std::uint32_t vocab, const F& f) {
  const auto call = [&](auto token) {
    auto* const tokens = static_cast<decltype(token)*>(out.mutable_data());
    const py::gil_scoped_release release;
    f(tokens);
  };
  if (py::isinstance<py::array_t<std::uint16_t>>(out)) {
    if (vocab > 65536)
      fail("vocab must be at most 65536 for uint16 tokens, got " + to_string(vocab) +
           "; make out with dtype uint32");
    call(std::uint16_t{});
  } else if (py::isinstance<py::array_t<std::uint32_t>>(out)) {
    call(std::uint32_t{});
  } else if (py::isinstance<py::array_t<std::int32_t>>(out)) {
    call(std::int32_t{});
  } else if (py::isinstance<py::array_t<std::int64_t>>(out)) {
    call(std::int64_t{});
  } else {
    fail("out must be uint16, uint32, int32 or int64 in native byte order, got " +
         to_string(out.dtype()) + "; make it with one of these dtypes");
  }
}

fastmem::PhiloxWords philox4x32(fastmem::PhiloxCounter counter, fastmem::PhiloxKey key) {
  return fastmem::philox4x32(counter, key);
}

void fill_range(py::array out, std::uint64_t seed, std::uint64_t vocab, std::uint64_t begin,
                std::uint64_t threads, const Array& cumulative, const std::string& isa) {
  const fastmem::TokenRule rule = token_rule(out, seed, vocab, threads, cumulative);
  const fastmem::Isa loops = isa_of(isa);
  const auto n = static_cast<std::size_t>(out.shape(0));
  check_range(begin, n, UINT64_MAX);
  without_gil(out, rule.vocab,
              [&](auto* tokens) { fastmem::fill_range(rule, begin, n, tokens, threads, loops); });
}

void fill_indices(py::array out, const py::array& indices, std::uint64_t seed,
                  std::uint64_t vocab, std::uint64_t threads, const Array& cumulative,
                  const std::string& isa) {
  const fastmem::TokenRule rule = token_rule(out, seed, vocab, threads, cumulative);
  const fastmem::Isa loops = isa_of(isa);
  check_array(indices, "indices", 1);
  check_type<std::uint64_t>(indices, "indices", "uint64");
  if (out.shape(0) != indices.shape(0))
    fail("out must have a row for each index, got " + to_string(out.shape(0)) + " rows for " +
         to_string(indices.shape(0)) + " indices; make it with len(indices) rows");
  check_apart(out, indices, "indices");
  const auto n = static_cast<std::size_t>(out.shape(0));
  const auto* const list = static_cast<const std::uint64_t*>(indices.data());
  without_gil(out, rule.vocab,
              [&](auto* tokens) { fastmem::fill_indices(rule, list, n, tokens, threads, loops); });
}

void check_order(const py::array& out, std::uint64_t threads) {
  check_array(out, "out", 1);
  check_writeable(out, "out");
  check_type<std::uint64_t>(out, "out", "uint64");
  check_limits("threads", threads, 1, UINT64_MAX);
}

void permutation(py::array out, std::uint64_t seed, std::uint64_t epoch, std::uint64_t last,
                 std::uint64_t begin, std::uint64_t threads, const std::string& isa) {
  check_order(out, threads);
  const fastmem::Isa loops = isa_of(isa);
  const auto n = static_cast<std::size_t>(out.shape(0));
  check_range(begin, n, last);
  auto* const indices = static_cast<std::uint64_t*>(out.mutable_data());
  const py::gil_scoped_release release;
  fastmem::permutation({seed, epoch, last}, begin, n, indices, threads, loops);
}

void permutation_at(py::array out, const py::array& places, std::uint64_t seed,
                    std::uint64_t epoch, std::uint64_t last, std::uint64_t threads,
                    bool inverse, const std::string& isa) {
  check_order(out, threads);
  const fastmem::Isa loops = isa_of(isa);
  check_array(places, "places", 1);
  check_type<std::uint64_t>(places, "places", "uint64");
  if (out.shape(0) != places.shape(0))
    fail("out must have an entry for each place, got " + to_string(out.shape(0)) + " for " +
         to_string(places.shape(0)) + " places; make it with len(places) entries");
  check_apart(out, places, "places");
  const auto n = static_cast<std::size_t>(out.shape(0));
  const auto* const list = static_cast<const std::uint64_t*>(places.data());
  const auto* const beyond = std::find_if(list, list + n, [=](auto place) { return place > last; });
  if (beyond != list + n)
    fail("places must be at most last = " + to_string(last) + ", got " + to_string(*beyond) +
         " at " + to_string(beyond - list) + "; leave it out");
  auto* const elements = static_cast<std::uint64_t*>(out.mutable_data());
  const py::gil_scoped_release release;
  fastmem::permutation_at({seed, epoch, last}, list, n, inverse, elements, threads, loops);
}

}  // namespace

void bind_sequences(py::module_& module) {
  using namespace pybind11::literals;
  module.def("philox4x32", philox4x32, "counter"_a, "key"_a);
  module.def("fill_range", fill_range, "out"_a, py::kw_only(), "seed"_a, "vocab"_a, "begin"_a,
             "threads"_a, "cumulative"_a = py::none(), "isa"_a = "best");
  module.def("fill_indices", fill_indices, "out"_a, "indices"_a, py::kw_only(), "seed"_a,
             "vocab"_a, "threads"_a, "cumulative"_a = py::none(), "isa"_a = "best");
  module.def("permutation", permutation, "out"_a, py::kw_only(), "seed"_a, "epoch"_a, "last"_a,
             "begin"_a, "threads"_a, "isa"_a = "best");
  module.def("permutation_at", permutation_at, "out"_a, "places"_a, py::kw_only(), "seed"_a,
             "epoch"_a, "last"_a, "threads"_a, "inverse"_a = false, "isa"_a = "best");
}

}  // namespace binding
