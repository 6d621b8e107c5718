// Checks of arrays and numbers for the bindings; each raises ValueError with both values.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "shared/isa.h"

namespace binding {

namespace py = pybind11;
using Array = std::optional<py::array>;

using std::to_string;
inline std::string to_string(const py::object& value) { return py::str(value); }

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

inline void check_array(const py::array& array, const std::string& name, int dimensions) {
  if (array.ndim() != dimensions)
    fail(name + " must have " + to_string(dimensions) + " dimension(s), got shape " +
         to_string(array.attr("shape")) + "; reshape it");
  if (!(array.flags() & py::array::c_style))
    fail(name + " must be C-contiguous, got strides " + to_string(array.attr("strides")) +
         " for shape " + to_string(array.attr("shape")) + "; make it with numpy.empty");
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    fail(name + " must be aligned to its dtype " + to_string(array.dtype()) +
         ", got a misaligned address; make it with numpy.empty");
}

template <class T>
inline void check_type(const py::array& array, const std::string& name, const std::string& type) {
  if (!py::isinstance<py::array_t<T>>(array))
    fail(name + " must be " + type + " in native byte order, got " + to_string(array.dtype()) +
         "; pass " + name + ".astype(numpy." + type + ")");
}

inline void check_shape(const py::array& array, const std::string& name,
                        const std::vector<std::size_t>& shape) {
  check_array(array, name, static_cast<int>(shape.size()));
  for (std::size_t i = 0; i < shape.size(); ++i)
    if (static_cast<std::size_t>(array.shape(static_cast<py::ssize_t>(i))) != shape[i])
      fail(name + " must have the shape " + to_string(py::cast(shape)) + ", got " +
           to_string(array.attr("shape")) + "; reshape it");
}

inline void check_writeable(const py::array& array, const std::string& name) {
  if (!array.writeable()) fail(name + " must be writeable, got a read-only array; pass a copy");
}

inline bool overlap(const py::array& a, const py::array& b) {
  const char* const a_data = static_cast<const char*>(a.data());
  const char* const b_data = static_cast<const char*>(b.data());
  return a_data < b_data + b.nbytes() && b_data < a_data + a.nbytes();
}

inline void check_limits(const std::string& name, std::uint64_t value, std::uint64_t least,
                         std::uint64_t most) {
  if (value < least || value > most)
    fail(name + " must be from " + to_string(least) + " to " + to_string(most) + ", got " +
         to_string(value) + "; choose a number within these limits");
}

// Checks an array that is written; `others` are all arrays read or written in the same call.
template <class T>
T* output(py::array& array, const std::string& name, const std::string& type,
          const std::vector<std::size_t>& shape, const std::vector<py::array>& others) {
  check_shape(array, name, shape);
  check_type<T>(array, name, type);
  check_writeable(array, name);
  for (const auto& other : others)
    if (overlap(array, other))
      fail(name + " must not share memory with another argument; make it with numpy.empty");
  return static_cast<T*>(array.mutable_data());
}

inline fastmem::Isa isa_of(const std::string& name) {
  using fastmem::Isa;
  const Isa isa = name == "portable" ? Isa::portable
                  : name == "avx2"   ? Isa::avx2
                  : name == "avx512" ? Isa::avx512
                  : name == "best"   ? fastmem::best_isa()
                                     : throw py::value_error(
                                         "isa must be best, portable, avx2 or avx512, got " + name +
                                         "; choose one of these");
  if (!fastmem::has_isa(isa))
    fail("isa must be an instruction set of this machine, got " + name + "; pass best");
  return isa;
}

void bind_gpt(py::module_& module);
void bind_likelihood(py::module_& module);
void bind_sequences(py::module_& module);

}  // namespace binding
