// Shared by the C++ tests: reports failures and counts them.
#pragma once

#include <iostream>

inline int failures = 0;

template <class... Parts>
void expect(bool holds, const Parts&... what) {
  if (holds) return;
  ++failures;
  (std::cerr << "FAILED: " << ... << what) << "\n";
}
