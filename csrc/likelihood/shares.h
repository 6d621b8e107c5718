// Divides the work of a problem among threads.
#pragma once

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "likelihood/likelihood.h"
#include "likelihood/part.h"
#include "shared/parts.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastmem {

// Multiplications of about 50 microseconds: a thread takes a few to wake and tens to start.
constexpr double kLeastWorkPerThread = 2.5e6;

// Runs a job on PyTorch's threads, if its OpenMP (libgomp) is in this process. They stay awake for
// a while after an operation, and other threads would wait for their cores.
//
// A fork copies none of these threads, and libgomp would wait for them in the child. They end
// before a fork, and the next call in either process makes them anew. Where this fails (an older
// libgomp), the child starts threads of its own.
using Team = void (*)(void (*run)(void*), void* job, unsigned threads, unsigned flags);
inline std::atomic<bool> team_lost{false};

template <class F>
F symbol(const char* name) {
#ifdef RTLD_DEFAULT
  return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
#else
  return nullptr;
#endif
}

inline Team team() {
  static const auto found = symbol<Team>("GOMP_parallel");
  return team_lost ? nullptr : found;
}

// Called once, when the module is imported.
inline void end_team_before_forks() {
#ifdef RTLD_DEFAULT
  static bool ended = true;
  pthread_atfork(
      [] {
        constexpr int kHard = 2;  // omp_pause_hard
        const auto pause = symbol<int (*)(int)>("omp_pause_resource_all");
        ended = !symbol<Team>("GOMP_parallel") || (pause && pause(kHard) == 0);
      },
      nullptr,
      [] {
        if (!ended) team_lost = true;
      });
#endif
}

// Calls f(part) for each of `parts`, on `parts` threads if the system has as many.
template <class F>
void in_parallel(std::size_t parts, const F& f) {
  struct Job {
    const F& f;
    std::vector<std::exception_ptr> errors;
    std::atomic<std::size_t> next{0};

    void run() {
      for (std::size_t part; (part = next++) < errors.size();) {
        try {
          f(part);
        } catch (...) {
          errors[part] = std::current_exception();
        }
      }
    }
  } job{f, std::vector<std::exception_ptr>(parts)};

  if (parts > 1 && team()) {
    const auto run = [](void* data) { static_cast<Job*>(data)->run(); };
    team()(run, &job, static_cast<unsigned>(parts), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (std::size_t i = 1; i < parts; ++i) others.emplace_back(&Job::run, &job);
    } catch (const std::exception&) {
      // The system is out of threads: the started threads take all parts.
    }
    job.run();
    for (auto& other : others) other.join();
  }
  for (const auto& error : job.errors)
    if (error) std::rethrow_exception(error);
}

// One thread's part of one model: some rows with all tokens, or some tokens with all rows.
struct Piece {
  std::size_t model;
  Span rows, tokens;
  std::size_t slot;  // number of earlier pieces of the model
};

// Rows or tokens of all models, laid end to end and cut at tiles into parts of about equal length.
// The cuts depend on the arguments alone.
class Shares {
 public:
  Shares(const Likelihood& problem, const Loops& loops, std::size_t threads, bool rows)
      : by_rows(rows) {
    const std::size_t step = by_rows ? loops.panel : loops.tokens;
    const std::size_t items = by_rows ? problem.rows : problem.vocab;
    const std::size_t steps = (items + step - 1) / step, all = steps * problem.models;
    const double work = static_cast<double>(problem.models) * static_cast<double>(problem.rows) *
                        static_cast<double>(problem.vocab) *
                        static_cast<double>(problem.width + 12);
    const std::size_t most = std::min(all, static_cast<std::size_t>(work / kLeastWorkPerThread));
    const std::size_t count = std::max<std::size_t>(1, std::min(threads, most));
    parts.resize(count);
    std::vector<std::size_t> slots(problem.models);
    for (std::size_t p = 0; p < count; ++p) {
      const std::size_t end = edge(all, count, p + 1);
      for (std::size_t at = edge(all, count, p); at < end;) {
        const std::size_t model = at / steps, first = model * steps;
        const std::size_t to = std::min(end, first + steps);
        const Span span = {(at - first) * step, std::min(items, (to - first) * step)};
        parts[p].push_back({model, by_rows ? span : Span{0, problem.rows},
                            by_rows ? Span{0, problem.vocab} : span, slots[model]++});
        slot_count = std::max(slot_count, slots[model]);
        at = to;
      }
    }
  }

  // Floats of rows that each part may pack: 4 MiB for all parts.
  std::size_t room() const { return (std::size_t{1} << 20) / parts.size(); }

  bool by_rows;
  std::size_t slot_count = 1;  // the most pieces of a model
  std::vector<std::vector<Piece>> parts;
};

// Calls f(piece) for all pieces.
template <class F>
void for_each_piece(const Shares& shares, const F& f) {
  in_parallel(shares.parts.size(), [&](std::size_t part) {
    for (const Piece& piece : shares.parts[part]) f(piece);
  });
}

}  // namespace fastmem
