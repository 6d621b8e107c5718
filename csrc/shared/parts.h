// Divides work among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fastmem {

// The first item of part `part` if n items are cut into `parts` parts of about equal length.
inline std::uint64_t edge(std::uint64_t n, std::uint64_t parts, std::uint64_t part) {
  return n / parts * part + std::min(part, n % parts);
}

// Calls f(begin, end) for at most `threads` parts of [0, n), each on its own thread and of at least
// `least` items: starting a thread takes tens of microseconds.
template <class F>
void in_parts(std::uint64_t n, std::uint64_t least, std::uint64_t threads, const F& f) {
  const std::uint64_t parts =
      std::max<std::uint64_t>(1, std::min(threads, n / std::max<std::uint64_t>(1, least)));
  std::vector<std::thread> others;
  std::uint64_t started = 1;
  try {
    for (; started < parts; ++started)
      others.emplace_back(f, edge(n, parts, started), edge(n, parts, started + 1));
  } catch (const std::exception&) {
    // The system is out of threads: this thread does the remaining parts.
  }
  f(0, edge(n, parts, 1));
  f(edge(n, parts, started), n);
  for (auto& other : others) other.join();
}

}  // namespace fastmem
