// Sequences and orders for Python.

#include "bind.h"
#include "philox.h"
#include "sequences.h"

namespace binding {
namespace {

void check_uint64(const py::array& array, const std::string& name) {
  if (!py::isinstance<py::array_t<std::uint64_t>>(array))
    fail(name + " must be uint64 in native byte order, got " + to_string(array.dtype()) + "; pass " +
         name + ".astype(numpy.uint64)");
}

void check_apart(const py::array& a, const py::array& b) {
  if (overlap(a, b))
    fail("out and indices must not share memory, got the same; make out with numpy.empty");
}

// The n items begin, begin + 1, ... must end at `last`.
void check_range(std::uint64_t begin, std::uint64_t n, std::uint64_t last) {
  if (n != 0 && (begin > last || n - 1 > last - begin))
    fail("begin + len(out) - 1 must be at most " + to_string(last) + ", got begin = " + to_string(begin) +
         " and len(out) = " + to_string(n) + "; ask for fewer or begin earlier");
}

fastmem::TokenRule token_rule(const py::array& out, std::uint64_t seed, std::uint64_t vocab,
                              std::uint64_t threads) {
  check_array(out, "out", 2);
  check_writeable(out, "out");
  const auto length = static_cast<std::uint64_t>(out.shape(1));
  check_limits("out.shape[1], the length of a sequence,", length, 1, fastmem::kMaxLength);
  check_limits("vocab", vocab, 1, fastmem::kMaxVocab);
  check_limits("threads", threads, 1, UINT64_MAX);
  return {seed, length, static_cast<std::uint32_t>(vocab)};
}

// Calls f(tokens) with a pointer of out's type, without the GIL.
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
         to_string(out.dtype()) + "; make it with one of these");
  }
}

fastmem::PhiloxWords philox4x32(fastmem::PhiloxCounter counter, fastmem::PhiloxKey key) {
  return fastmem::philox4x32(counter, key);
}

void fill_range(py::array out, std::uint64_t seed, std::uint64_t vocab, std::uint64_t begin,
                std::uint64_t threads) {
  const fastmem::TokenRule rule = token_rule(out, seed, vocab, threads);
  const auto n = static_cast<std::size_t>(out.shape(0));
  check_range(begin, n, UINT64_MAX);
  without_gil(out, rule.vocab,
              [&](auto* tokens) { fastmem::fill_range(rule, begin, n, tokens, threads); });
}

void fill_indices(py::array out, const py::array& indices, std::uint64_t seed,
                  std::uint64_t vocab, std::uint64_t threads) {
  const fastmem::TokenRule rule = token_rule(out, seed, vocab, threads);
  check_array(indices, "indices", 1);
  check_uint64(indices, "indices");
  if (out.shape(0) != indices.shape(0))
    fail("out must have one row an index, got " + to_string(out.shape(0)) + " rows for " +
         to_string(indices.shape(0)) + " indices; make it with len(indices) rows");
  check_apart(out, indices);
  const auto n = static_cast<std::size_t>(out.shape(0));
  const auto* const list = static_cast<const std::uint64_t*>(indices.data());
  without_gil(out, rule.vocab,
              [&](auto* tokens) { fastmem::fill_indices(rule, list, n, tokens, threads); });
}

void permutation(py::array out, std::uint64_t seed, std::uint64_t epoch, std::uint64_t last,
                 std::uint64_t begin, std::uint64_t threads) {
  check_array(out, "out", 1);
  check_writeable(out, "out");
  check_uint64(out, "out");
  const auto n = static_cast<std::size_t>(out.shape(0));
  check_range(begin, n, last);
  check_limits("threads", threads, 1, UINT64_MAX);
  auto* const indices = static_cast<std::uint64_t*>(out.mutable_data());
  const py::gil_scoped_release release;
  fastmem::permutation(seed, epoch, last, begin, n, indices, threads);
}

}  // namespace

void bind_sequences(py::module_& module) {
  using namespace pybind11::literals;
  module.def("philox4x32", philox4x32, "counter"_a, "key"_a);
  module.def("fill_range", fill_range, "out"_a, py::kw_only(), "seed"_a, "vocab"_a, "begin"_a,
             "threads"_a);
  module.def("fill_indices", fill_indices, "out"_a, "indices"_a, py::kw_only(), "seed"_a,
             "vocab"_a, "threads"_a);
  module.def("permutation", permutation, "out"_a, py::kw_only(), "seed"_a, "epoch"_a, "last"_a,
             "begin"_a, "threads"_a);
}

}  // namespace binding
