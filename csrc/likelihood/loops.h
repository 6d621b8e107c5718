// The loops of likelihood/part.h for one instruction set: shared/loops_<isa>.cpp includes this
// file.

#include "likelihood/backward.h"

namespace fastmem {
namespace {

template <class T>
constexpr LoopsOf loops_of() {
  return {{forward<T, kNothing>, forward<T, kMoments>, forward<T, kBest>,
           forward<T, kMomentsAndBest>},
          backward<T>, ahead_walk<T>, ahead_tokens<T>, write_dhidden<T>};
}

constexpr Loops kLoops = {{loops_of<float>(), loops_of<std::uint16_t>()}, kPanel, kLanes, kTokens};

}  // namespace
}  // namespace fastmem
