// fastmem._core: only bind*.cpp and this file know pybind11. Each function checks its arguments,
// releases the GIL and writes results to the caller's arrays, so that nothing is copied.
// fastmem/_core.pyi is the documentation.

#include "likelihood/shares.h"
#include "shared/bind.h"

namespace {

bool has_isa(const std::string& isa) {
  return isa == "portable" || (isa == "avx2" && fastmem::has_isa(fastmem::Isa::avx2)) ||
         (isa == "avx512" && fastmem::has_isa(fastmem::Isa::avx512));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  using namespace pybind11::literals;
  fastmem::end_team_before_forks();
  binding::bind_gpt(module);
  binding::bind_likelihood(module);
  binding::bind_sequences(module);
  module.def("has_isa", has_isa, "isa"_a);
}
