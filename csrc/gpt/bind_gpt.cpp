// fastmem._core.gpt_bits and gpt_gradients: see fastmem/_core.pyi.

#include "gpt/gpt.h"
#include "shared/bind.h"

namespace binding {
namespace {

struct Shape {
  std::uint64_t layers, width, heads, vocab, length;
};

// Checks every argument, and every token, because the core uses tokens as indices.
fastmem::Gpt problem_of(const py::array& parameters, const py::array& tokens, const Shape& shape,
                        std::uint64_t threads) {
  check_limits("layers", shape.layers, 1, 1 << 16);
  check_limits("width", shape.width, 1, 1 << 16);
  check_limits("heads", shape.heads, 1, shape.width);
  check_limits("vocab", shape.vocab, 1, INT32_MAX);
  check_limits("length", shape.length, 1, 1 << 24);
  check_limits("threads", threads, 1, UINT64_MAX);
  if (shape.width % shape.heads != 0)
    fail("heads must divide the width, got " + to_string(shape.heads) + " and " +
         to_string(shape.width) + "; choose a divisor of the width");
  check_array(parameters, "parameters", 2);
  check_type<float>(parameters, "parameters", "float32");
  check_array(tokens, "tokens", 3);
  check_type<std::int64_t>(tokens, "tokens", "int64");
  fastmem::Gpt problem{};
  problem.models = static_cast<std::size_t>(parameters.shape(0));
  problem.batch = static_cast<std::size_t>(tokens.shape(1));
  problem.layers = shape.layers;
  problem.width = shape.width;
  problem.heads = shape.heads;
  problem.vocab = shape.vocab;
  problem.length = shape.length;
  check_shape(parameters, "parameters", {problem.models, problem.parameter_count()});
  check_limits("tokens.shape[1], the batch,", problem.batch, 1, UINT64_MAX);
  const auto width = static_cast<std::size_t>(tokens.shape(2));
  // The exp_logits of attention are T * T / 2 floats a head and layer: no such product overflows.
  check_limits("tokens.shape[2]", width, 2, std::min<std::uint64_t>(shape.length, 1 << 15) + 1);
  check_shape(tokens, "tokens", {problem.models, problem.batch, width});
  problem.time = width - 1;
  problem.parameters = static_cast<const float*>(parameters.data());
  problem.tokens = static_cast<const std::int64_t*>(tokens.data());
  for (py::ssize_t i = 0; i < tokens.size(); ++i)
    if (problem.tokens[i] < 0 || static_cast<std::uint64_t>(problem.tokens[i]) >= shape.vocab)
      fail("tokens must be from 0 to " + to_string(shape.vocab - 1) + ", got " +
           to_string(problem.tokens[i]) + "; give the model a larger vocabulary");
  return problem;
}

void gpt_bits(py::array bits, const py::array& parameters, const py::array& tokens,
              std::uint64_t layers, std::uint64_t width, std::uint64_t heads, std::uint64_t vocab,
              std::uint64_t length, std::uint64_t threads, const std::string& isa) {
  const fastmem::Gpt problem =
      problem_of(parameters, tokens, {layers, width, heads, vocab, length}, threads);
  auto* const out =
      output<float>(bits, "bits", "float32", {problem.models, problem.batch, problem.time},
                    {parameters, tokens});
  const fastmem::Isa chosen = isa_of(isa);
  const py::gil_scoped_release release;
  fastmem::gpt_bits(problem, threads, chosen, out);
}

void gpt_gradients(py::array losses, py::array gradients, const py::array& parameters,
                   const py::array& tokens, std::uint64_t layers, std::uint64_t width,
                   std::uint64_t heads, std::uint64_t vocab, std::uint64_t length,
                   std::uint64_t threads, const std::string& isa) {
  const fastmem::Gpt problem =
      problem_of(parameters, tokens, {layers, width, heads, vocab, length}, threads);
  auto* const gradients_out =
      output<float>(gradients, "gradients", "float32",
                    {problem.models, problem.parameter_count()}, {parameters, tokens});
  auto* const losses_out = output<double>(losses, "losses", "float64", {problem.models},
                                          {parameters, tokens, gradients});
  const fastmem::Isa chosen = isa_of(isa);
  const py::gil_scoped_release release;
  fastmem::gpt_gradients(problem, threads, chosen, losses_out, gradients_out);
}

}  // namespace

void bind_gpt(py::module_& module) {
  using namespace pybind11::literals;
  module.def("gpt_bits", gpt_bits, "bits"_a, py::kw_only(), "parameters"_a, "tokens"_a, "layers"_a,
             "width"_a, "heads"_a, "vocab"_a, "length"_a, "threads"_a, "isa"_a = "best");
  module.def("gpt_gradients", gpt_gradients, "losses"_a, "gradients"_a, py::kw_only(),
             "parameters"_a, "tokens"_a, "layers"_a, "width"_a, "heads"_a, "vocab"_a, "length"_a,
             "threads"_a, "isa"_a = "best");
}

}  // namespace binding
