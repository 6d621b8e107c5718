// fastmem._core: the only file that knows pybind11. Each function checks its arguments, releases
// the GIL and calls; results go into the caller's arrays, so that nothing is copied.
// fastmem/_core.pyi is the documentation.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "likelihood.h"
#include "philox.h"
#include "sequences.h"

namespace py = pybind11;

namespace {

using std::to_string;
std::string to_string(const py::object& value) { return py::str(value); }

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

void check_array(const py::array& array, const std::string& name, int dimensions) {
  if (array.ndim() != dimensions)
    fail(name + " must have " + to_string(dimensions) + " dimension(s), got shape " +
         to_string(array.attr("shape")) + "; reshape it");
  if (!(array.flags() & py::array::c_style))
    fail(name + " must be C-contiguous, got strides " + to_string(array.attr("strides")) +
         " for shape " + to_string(array.attr("shape")) + "; make it with numpy.empty");
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    fail(name + " must be aligned to its dtype " + to_string(array.dtype()) +
         ", got an address that is not; make it with numpy.empty");
}

void check_writeable(const py::array& array, const std::string& name) {
  if (!array.writeable()) fail(name + " must be writeable, got a read-only array; pass a copy");
}

void check_uint64(const py::array& array, const std::string& name) {
  if (!py::isinstance<py::array_t<std::uint64_t>>(array))
    fail(name + " must be uint64 in native byte order, got " + to_string(array.dtype()) + "; pass " +
         name + ".astype(numpy.uint64)");
}

bool overlap(const py::array& a, const py::array& b) {
  const char* const a_data = static_cast<const char*>(a.data());
  const char* const b_data = static_cast<const char*>(b.data());
  return a_data < b_data + b.nbytes() && b_data < a_data + a.nbytes();
}

void check_apart(const py::array& a, const py::array& b) {
  if (overlap(a, b))
    fail("out and indices must not share memory, got the same; make out with numpy.empty");
}

void check_limits(const std::string& name, std::uint64_t value, std::uint64_t least,
                  std::uint64_t most) {
  if (value < least || value > most)
    fail(name + " must be from " + to_string(least) + " to " + to_string(most) + ", got " + to_string(value) +
         "; choose one in these limits");
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

template <class T>
void check_type(const py::array& array, const std::string& name, const std::string& type) {
  if (!py::isinstance<py::array_t<T>>(array))
    fail(name + " must be " + type + " in native byte order, got " + to_string(array.dtype()) +
         "; pass " + name + ".astype(numpy." + type + ")");
}

void check_shape(const py::array& array, const std::string& name,
                 const std::vector<std::size_t>& shape) {
  check_array(array, name, static_cast<int>(shape.size()));
  for (std::size_t i = 0; i < shape.size(); ++i)
    if (static_cast<std::size_t>(array.shape(static_cast<py::ssize_t>(i))) != shape[i])
      fail(name + " must have the shape " + to_string(py::cast(shape)) + ", got " +
           to_string(array.attr("shape")) + "; reshape it");
}

using Array = std::optional<py::array>;

// A problem, and what it reads and writes: no two of which may share memory if one is written.
class TokenBits {
 public:
  TokenBits(const py::array& hidden, const py::array& weight, const py::array& targets,
            const Array& bias, float softcap, float temperature, std::int64_t ignore_index,
            std::uint64_t threads, const std::string& isa)
      : threads_(threads) {
    check_array(hidden, "hidden", 3);
    check_array(weight, "weight", 3);
    problem_.models = static_cast<std::size_t>(hidden.shape(0));
    problem_.rows = static_cast<std::size_t>(hidden.shape(1));
    problem_.width = static_cast<std::size_t>(hidden.shape(2));
    problem_.vocab = static_cast<std::size_t>(weight.shape(1));
    check_limits("hidden.shape[2], the width,", problem_.width, 1, UINT64_MAX);
    check_limits("weight.shape[1], the vocabulary,", problem_.vocab, 1, INT32_MAX);
    problem_.bfloat16 = py::isinstance<py::array_t<std::uint16_t>>(hidden);
    if (problem_.bfloat16) {
      check_type<std::uint16_t>(weight, "weight", "uint16");
    } else {
      check_type<float>(hidden, "hidden", "float32");
      check_type<float>(weight, "weight", "float32");
    }
    check_shape(weight, "weight", {problem_.models, problem_.vocab, problem_.width});
    check_shape(targets, "targets", {problem_.models, problem_.rows});
    check_type<std::int64_t>(targets, "targets", "int64");
    if (!(softcap >= 0 && std::isfinite(softcap)) || !(temperature > 0 && std::isfinite(temperature)))
      fail("softcap must be at least 0, temperature above 0, both finite, got " +
           to_string(softcap) + " and " + to_string(temperature) + "; choose others");
    check_limits("threads", threads, 1, UINT64_MAX);
    problem_.hidden = hidden.data();
    problem_.weight = weight.data();
    problem_.targets = static_cast<const std::int64_t*>(targets.data());
    problem_.bias = bias ? input<float>(*bias, "bias", "float32", {problem_.models, problem_.vocab}) : nullptr;
    problem_.softcap = softcap;
    problem_.temperature = temperature;
    problem_.ignore_index = ignore_index;
    inputs_.insert(inputs_.end(), {hidden, weight, targets});
    isa_ = isa == "portable" ? fastmem::Isa::portable
           : isa == "avx2"   ? fastmem::Isa::avx2
           : isa == "avx512" ? fastmem::Isa::avx512
           : isa == "best"   ? fastmem::best_isa()
                             : throw py::value_error("isa must be best, portable, avx2 or avx512, got " +
                                                     isa + "; choose one of these");
    if (!fastmem::has_isa(isa_)) fail("isa must be one that this machine has, got " + isa +
                                      "; pass best");
  }

  template <class T>
  const T* input(const py::array& array, const std::string& name, const std::string& type,
                 const std::vector<std::size_t>& shape) {
    check_shape(array, name, shape);
    check_type<T>(array, name, type);
    inputs_.push_back(array);
    return static_cast<const T*>(array.data());
  }

  template <class T>
  T* output(py::array& array, const std::string& name, const std::string& type,
            const std::vector<std::size_t>& shape) {
    check_shape(array, name, shape);
    check_type<T>(array, name, type);
    check_writeable(array, name);
    for (const auto& others : {inputs_, outputs_})
      for (const auto& other : others)
        if (overlap(array, other))
          fail(name + " must not share memory with another argument, got the same; make it with "
                      "numpy.empty");
    outputs_.push_back(array);
    return static_cast<T*>(array.mutable_data());
  }

  float* gradient(Array& array, const std::string& name, const std::vector<std::size_t>& shape) {
    return array ? output<float>(*array, name, "float32", shape) : nullptr;
  }

  // Of what has one entry a row, and is not asked for if it is none.
  template <class T>
  T* per_row(Array& array, const std::string& name, const std::string& type) {
    return array ? output<T>(*array, name, type, {problem_.models, problem_.rows}) : nullptr;
  }

  const fastmem::Likelihood& problem() const { return problem_; }
  fastmem::Isa isa() const { return isa_; }
  std::size_t threads() const { return threads_; }

 private:
  fastmem::Likelihood problem_{};
  fastmem::Isa isa_{};
  std::size_t threads_;
  std::vector<py::array> inputs_, outputs_;
};

// With a gradient to write, those of the sum of bits too.
void token_bits(py::array bits, py::array lse, Array dhidden, Array dweight, Array dbias,
                const py::array& hidden, const py::array& weight, const py::array& targets,
                const Array& bias, float softcap, float temperature, std::int64_t ignore_index,
                std::uint64_t threads, Array entropy_bits, Array second_moment, Array lse_bits,
                Array is_greedy, const std::string& isa) {
  TokenBits call(hidden, weight, targets, bias, softcap, temperature, ignore_index, threads, isa);
  const fastmem::Likelihood& p = call.problem();
  auto* const bits_out = call.output<float>(bits, "bits", "float32", {p.models, p.rows});
  auto* const lse_out = call.output<double>(lse, "lse", "float64", {p.models, p.rows});
  float* const dhidden_out = call.gradient(dhidden, "dhidden", {p.models, p.rows, p.width});
  float* const dweight_out = call.gradient(dweight, "dweight", {p.models, p.vocab, p.width});
  float* const dbias_out = call.gradient(dbias, "dbias", {p.models, p.vocab});
  const fastmem::Statistics statistics = {
      call.per_row<float>(entropy_bits, "entropy_bits", "float32"),
      call.per_row<float>(second_moment, "second_moment", "float32"),
      call.per_row<float>(lse_bits, "lse_bits", "float32"),
      call.per_row<bool>(is_greedy, "is_greedy", "bool")};
  const bool gradients = dhidden || dweight || dbias;
  if (gradients && (entropy_bits || second_moment || lse_bits || is_greedy))
    fail("statistics and gradients are not made in one call, got both; call twice");
  const py::gil_scoped_release release;
  if (gradients)
    fastmem::token_bits_and_gradients(p, call.threads(), call.isa(), bits_out, lse_out, dhidden_out,
                                      dweight_out, dbias_out);
  else
    fastmem::token_bits(p, call.threads(), call.isa(), bits_out, lse_out, statistics);
}

void token_bits_backward(Array dhidden, Array dweight, Array dbias, const py::array& upstream,
                         const py::array& lse, const py::array& hidden, const py::array& weight,
                         const py::array& targets, const Array& bias, float softcap,
                         float temperature, std::int64_t ignore_index, std::uint64_t threads,
                         const std::string& isa) {
  TokenBits call(hidden, weight, targets, bias, softcap, temperature, ignore_index, threads, isa);
  const fastmem::Likelihood& p = call.problem();
  const auto* const upstream_in = call.input<float>(upstream, "upstream", "float32", {p.models, p.rows});
  const auto* const lse_in = call.input<double>(lse, "lse", "float64", {p.models, p.rows});
  float* const dhidden_out = call.gradient(dhidden, "dhidden", {p.models, p.rows, p.width});
  float* const dweight_out = call.gradient(dweight, "dweight", {p.models, p.vocab, p.width});
  float* const dbias_out = call.gradient(dbias, "dbias", {p.models, p.vocab});
  const py::gil_scoped_release release;
  fastmem::token_bits_backward(p, upstream_in, lse_in, call.threads(), call.isa(), dhidden_out,
                               dweight_out, dbias_out);
}

bool has_isa(const std::string& isa) {
  return isa == "portable" || (isa == "avx2" && fastmem::has_isa(fastmem::Isa::avx2)) ||
         (isa == "avx512" && fastmem::has_isa(fastmem::Isa::avx512));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  using namespace pybind11::literals;
  module.def("philox4x32", philox4x32, "counter"_a, "key"_a);
  module.def("fill_range", fill_range, "out"_a, py::kw_only(), "seed"_a, "vocab"_a, "begin"_a,
             "threads"_a);
  module.def("fill_indices", fill_indices, "out"_a, "indices"_a, py::kw_only(), "seed"_a,
             "vocab"_a, "threads"_a);
  module.def("permutation", permutation, "out"_a, py::kw_only(), "seed"_a, "epoch"_a, "last"_a,
             "begin"_a, "threads"_a);
  module.def("token_bits", token_bits, "bits"_a, "lse"_a, "dhidden"_a, "dweight"_a, "dbias"_a,
             py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "bias"_a, "softcap"_a,
             "temperature"_a, "ignore_index"_a, "threads"_a, "entropy_bits"_a = py::none(),
             "second_moment"_a = py::none(), "lse_bits"_a = py::none(),
             "is_greedy"_a = py::none(), "isa"_a = "best");
  module.def("token_bits_backward", token_bits_backward, "dhidden"_a, "dweight"_a, "dbias"_a,
             py::kw_only(), "upstream"_a, "lse"_a, "hidden"_a, "weight"_a, "targets"_a, "bias"_a,
             "softcap"_a, "temperature"_a, "ignore_index"_a, "threads"_a, "isa"_a = "best");
  module.def("has_isa", has_isa, "isa"_a);
}
