// fastmem._core.token_bits and token_bits_backward: see fastmem/_core.pyi.

#include <cmath>

#include "likelihood/likelihood.h"
#include "shared/bind.h"

namespace binding {
namespace {

// A problem and its arrays. A written array shares memory with no other array.
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
    if (!(softcap >= 0 && std::isfinite(softcap) && temperature > 0 && std::isfinite(temperature)))
      fail("softcap must be at least 0, temperature above 0, both finite, got " +
           to_string(softcap) + " and " + to_string(temperature) + "; choose others");
    check_limits("threads", threads, 1, UINT64_MAX);
    problem_.hidden = hidden.data();
    problem_.weight = weight.data();
    problem_.targets = static_cast<const std::int64_t*>(targets.data());
    if (bias)
      problem_.bias = input<float>(*bias, "bias", "float32", {problem_.models, problem_.vocab});
    problem_.softcap = softcap;
    problem_.temperature = temperature;
    problem_.ignore_index = ignore_index;
    arrays_.insert(arrays_.end(), {hidden, weight, targets});
    isa_ = isa_of(isa);
  }

  template <class T>
  const T* input(const py::array& array, const std::string& name, const std::string& type,
                 const std::vector<std::size_t>& shape) {
    check_shape(array, name, shape);
    check_type<T>(array, name, type);
    arrays_.push_back(array);
    return static_cast<const T*>(array.data());
  }

  template <class T>
  T* output(py::array& array, const std::string& name, const std::string& type,
            const std::vector<std::size_t>& shape) {
    T* const data = binding::output<T>(array, name, type, shape, arrays_);
    arrays_.push_back(array);
    return data;
  }

  float* gradient(Array& array, const std::string& name, const std::vector<std::size_t>& shape) {
    return array ? output<float>(*array, name, "float32", shape) : nullptr;
  }

  // An output with an entry for each row; null if the array is None.
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
  std::vector<py::array> arrays_;
};

// Writes the gradients of the sum of bits too, unless all of their arrays are None.
void token_bits(py::array bits, py::array lse, Array dhidden, Array dweight, Array dbias,
                const py::array& hidden, const py::array& weight, const py::array& targets,
                const Array& bias, float softcap, float temperature, std::int64_t ignore_index,
                std::uint64_t threads, Array entropy_bits, Array variance, Array lse_bits,
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
      call.per_row<float>(variance, "variance", "float32"),
      call.per_row<float>(lse_bits, "lse_bits", "float32"),
      call.per_row<bool>(is_greedy, "is_greedy", "bool")};
  const bool gradients = dhidden || dweight || dbias;
  if (gradients && (entropy_bits || variance || lse_bits || is_greedy))
    fail("pass arrays for statistics or for gradients, got both; call twice");
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
  const auto* const upstream_in =
      call.input<float>(upstream, "upstream", "float32", {p.models, p.rows});
  const auto* const lse_in = call.input<double>(lse, "lse", "float64", {p.models, p.rows});
  float* const dhidden_out = call.gradient(dhidden, "dhidden", {p.models, p.rows, p.width});
  float* const dweight_out = call.gradient(dweight, "dweight", {p.models, p.vocab, p.width});
  float* const dbias_out = call.gradient(dbias, "dbias", {p.models, p.vocab});
  const py::gil_scoped_release release;
  fastmem::token_bits_backward(p, upstream_in, lse_in, call.threads(), call.isa(), dhidden_out,
                               dweight_out, dbias_out);
}

}  // namespace

void bind_likelihood(py::module_& module) {
  using namespace pybind11::literals;
  module.def("token_bits", token_bits, "bits"_a, "lse"_a, "dhidden"_a, "dweight"_a, "dbias"_a,
             py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "bias"_a, "softcap"_a,
             "temperature"_a, "ignore_index"_a, "threads"_a, "entropy_bits"_a = py::none(),
             "variance"_a = py::none(), "lse_bits"_a = py::none(),
             "is_greedy"_a = py::none(), "isa"_a = "best");
  module.def("token_bits_backward", token_bits_backward, "dhidden"_a, "dweight"_a, "dbias"_a,
             py::kw_only(), "upstream"_a, "lse"_a, "hidden"_a, "weight"_a, "targets"_a, "bias"_a,
             "softcap"_a, "temperature"_a, "ignore_index"_a, "threads"_a, "isa"_a = "best");
}

}  // namespace binding
