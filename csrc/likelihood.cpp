#include "likelihood.h"

#include <array>
#include <atomic>
#include <exception>
#include <thread>

#include "likelihood_part.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace fastmem {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A thread takes microseconds to wake and tens of them to start, this many multiplications about 50.
constexpr double kLeastWorkPerThread = 2.5e6;

// The team of threads that PyTorch computes with, if its OpenMP (libgomp) is in this process. After
// an operation they stay awake for a while, and threads of our own would wait for their cores.
using Team = void (*)(void (*run)(void*), void* job, unsigned threads, unsigned flags);
Team team() {
#ifdef RTLD_DEFAULT
  static const auto found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Calls f(part) for each of `parts`, on as many threads where the system has them to give.
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
      // No more threads: those that there are do the rest.
    }
    job.run();
    for (auto& other : others) other.join();
  }
  for (const auto& error : job.errors)
    if (error) std::rethrow_exception(error);
}

// What all logits of a row have in common changes no probability, but costs every logit precision:
// with logits near 10^4 a float keeps 10^-3. So it is taken off the inputs where that is exact: the
// largest bias off each bias, and off each column of weight whose entries have one sign and are
// within a factor of 2 of each other, the smallest (exact: Sterbenz). Nothing is taken off under a
// softcap, which tells logits with and without it apart.
class Centred {
 public:
  explicit Centred(const Likelihood& problem) {
    if (problem.bias) {
      const float* const end = problem.bias + problem.vocab;
      float top = -kInfinity;
      for (const float* b = problem.bias; problem.softcap == 0 && b < end; ++b)
        if (*b > top && *b < kInfinity) top = *b;
      if (top == -kInfinity) top = 0;
      bias_.reserve(problem.vocab);
      for (const float* b = problem.bias; b < end; ++b) bias_.push_back(*b - top);
    }
    if (problem.softcap == 0) {
      if (problem.bfloat16)
        find_centre(static_cast<const std::uint16_t*>(problem.weight), problem);
      else
        find_centre(static_cast<const float*>(problem.weight), problem);
    }
  }

  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
  const float* centre() const { return centre_.empty() ? nullptr : centre_.data(); }

 private:
  static float value(float x) { return x; }
  static float value(std::uint16_t upper) {
    const std::uint32_t bits = std::uint32_t{upper} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  template <class T>
  void find_centre(const T* weight, const Likelihood& problem) {
    const std::size_t width = problem.width;
    // Columns that may still be within a factor of 2, with their smallest and largest size.
    struct Column {
      std::size_t d;
      float low, high;
    };
    std::vector<Column> columns;
    for (std::size_t d = 0; d < width; ++d) {
      const float x = value(weight[d]);
      if (x != 0 && std::abs(x) < kInfinity) columns.push_back({d, x, x});
    }
    for (std::size_t v = 1; v < problem.vocab && !columns.empty(); ++v) {
      std::size_t kept = 0;
      for (Column column : columns) {
        const float x = value(weight[v * width + column.d]);
        column.low = std::min(column.low, x);
        column.high = std::max(column.high, x);
        const bool near = column.low > 0   ? column.high <= 2 * column.low
                          : column.high < 0 ? column.low >= 2 * column.high
                                            : false;
        if (near && x == x) columns[kept++] = column;
      }
      columns.resize(kept);
    }
    if (columns.empty()) return;
    centre_.assign(width, 0);
    for (const Column& column : columns)
      centre_[column.d] = column.low > 0 ? column.low : column.high;
  }

  std::vector<float> bias_, centre_;
};

const Loops& loops_of(Isa isa) {
  return isa == Isa::avx512 ? kAvx512Loops : isa == Isa::avx2 ? kAvx2Loops : kPortableLoops;
}

// Rows or tokens shared out, the longer where both can be, in parts that begin where a tile does.
struct Shares {
  bool by_rows;
  std::size_t parts;
  std::size_t items, step;

  Shares(const Likelihood& problem, const Loops& loops, std::size_t threads, bool rows)
      : by_rows(rows) {
    step = by_rows ? loops.rows : loops.columns;
    items = by_rows ? problem.rows : problem.vocab;
    const double work = static_cast<double>(problem.rows) * static_cast<double>(problem.vocab) *
                        static_cast<double>(problem.width + 12);
    const std::size_t most = std::min((items + step - 1) / step,
                                      static_cast<std::size_t>(work / kLeastWorkPerThread));
    parts = std::max<std::size_t>(1, std::min(threads, most));
  }

  Span span(std::size_t part) const {
    const std::size_t steps = (items + step - 1) / step;
    const auto edge = [&](std::size_t p) {
      return std::min(items, (steps / parts * p + std::min(p, steps % parts)) * step);
    };
    return {edge(part), edge(part + 1)};
  }
};

Part part_of(const Likelihood& problem, const Centred& centred) {
  return {problem.width,   problem.vocab,   problem.hidden,       problem.weight,
          centred.centre(), centred.bias(), problem.targets,      problem.ignore_index,
          problem.softcap, static_cast<float>(kLog2E / problem.temperature)};
}

// Bits and log-sum-exp from `copies` sums of different tokens for each row.
void finish(const Likelihood& problem, const Part& part, const RowSums& sums, std::size_t copies,
            float* bits, double* lse) {
  const std::size_t n = problem.rows;
  const double scale = part.scale, unrounded = kLog2E / problem.temperature / scale;
  for (std::size_t row = 0; row < n; ++row) {
    double top = sums.shift[row], total = sums.sum[row];
    if (copies > 1) {
      for (std::size_t c = 1; c < copies; ++c) top = std::max<double>(top, sums.shift[c * n + row]);
      total = 0;
      for (std::size_t c = 0; c < copies; ++c)
        total += sums.sum[c * n + row] * std::exp2(sums.shift[c * n + row] - top);
    }
    const double all = std::log2(total);
    lse[row] = top + all;
    // The shift less the target first: both are large where the difference is small. The scale was
    // rounded for both.
    const double exact = (top - scale * sums.target[row]) * unrounded + all;
    bits[row] = problem.targets[row] == problem.ignore_index ? 0
                : exact < 0                                   ? 0
                                                              : static_cast<float>(exact);
  }
}

// Gradients that parts add to: where parts share memory, the first adds to the caller's and each
// other to its own, joined in the order of the parts.
class Totals {
 public:
  Totals(const Likelihood& problem, const Shares& shares, const Gradients& out)
      : arrays_{Array{out.hidden, problem.rows, problem.width, shares.by_rows, {}},
                Array{out.weight, problem.vocab, problem.width, !shares.by_rows, {}},
                Array{out.bias, problem.vocab, 1, !shares.by_rows, {}}} {
    for (Array& array : arrays_) array.others = std::vector<Floats>(shares.parts - 1);
  }

  // Called by the thread that then fills it, so that its memory is near.
  Gradients zeros(std::size_t part, Span span) {
    const auto start = [&](Array& array) -> float* {
      if (!array.out) return nullptr;
      if (array.split) {
        std::fill(array.out + span.begin * array.size, array.out + span.end * array.size, 0.F);
        return array.out;
      }
      if (part > 0) array.others[part - 1] = Floats(array.count * array.size);
      float* const own = part > 0 ? array.others[part - 1].get() : array.out;
      std::fill_n(own, array.count * array.size, 0.F);
      return own;
    };
    return {start(arrays_[0]), start(arrays_[1]), start(arrays_[2])};
  }

  void join() {
    for (const Array& array : arrays_)
      if (array.out && !array.split)
        for (const Floats& other : array.others)
          for (std::size_t i = 0; i < array.count * array.size; ++i) array.out[i] += other[i];
  }

 private:
  struct Array {
    float* out;
    std::size_t count, size;  // of items, and of each
    bool split;               // each part has its own span of items
    std::vector<Floats> others;
  };
  std::array<Array, 3> arrays_;
};

// NaN in dhidden for rows whose bits are NaN and count: an upstream of null is 1 everywhere.
void mark_rows(const Likelihood& problem, const Part& part, const double* lse,
               const float* upstream, float* dhidden) {
  const RowGradients rows = {nullptr, lse};
  for (std::size_t row = 0; dhidden && row < problem.rows; ++row)
    if (problem.targets[row] != problem.ignore_index && !rows.counts(part, row) &&
        !(upstream && upstream[row] == 0))
      std::fill_n(dhidden + row * problem.width, problem.width, kNaN);
}

}  // namespace

void token_bits(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                double* lse) {
  const Loops& loops = loops_of(isa);
  const std::size_t n = problem.rows;
  const Centred centred(problem);
  const Part part = part_of(problem, centred);
  const Shares shares(problem, loops, threads, problem.rows >= problem.vocab);
  // Each part that shares rows with others has its own sums.
  const std::size_t copies = shares.by_rows ? 1 : shares.parts;
  std::vector<float> shift(copies * n), sum(copies * n), target(n, kNaN);
  in_parallel(shares.parts, [&](std::size_t p) {
    const std::size_t copy = shares.by_rows ? 0 : p * n;
    const Span rows = shares.by_rows ? shares.span(p) : Span{0, n};
    const Span tokens = shares.by_rows ? Span{0, problem.vocab} : shares.span(p);
    loops.forward[problem.bfloat16](part, rows, tokens,
                                    {shift.data() + copy, sum.data() + copy, target.data()});
  });
  finish(problem, part, {shift.data(), sum.data(), target.data()}, copies, bits, lse);
}

void token_bits_backward(const Likelihood& problem, const float* upstream, const double* lse,
                         std::size_t threads, Isa isa, float* dhidden, float* dweight,
                         float* dbias) {
  const Loops& loops = loops_of(isa);
  const Centred centred(problem);
  const Part part = part_of(problem, centred);
  const Shares shares(problem, loops, threads, problem.rows >= problem.vocab);
  Totals totals(problem, shares, {dhidden, dweight, dbias});
  in_parallel(shares.parts, [&](std::size_t p) {
    const Span span = shares.span(p);
    const Span rows = shares.by_rows ? span : Span{0, problem.rows};
    const Span tokens = shares.by_rows ? Span{0, problem.vocab} : span;
    loops.backward[problem.bfloat16](part, rows, tokens, {upstream, lse}, totals.zeros(p, span));
  });
  totals.join();
  mark_rows(problem, part, lse, upstream, dhidden);
}

void token_bits_and_gradients(const Likelihood& problem, std::size_t threads, Isa isa, float* bits,
                              double* lse, float* dhidden, float* dweight, float* dbias) {
  const Loops& loops = loops_of(isa);
  const std::size_t n = problem.rows;
  const Centred centred(problem);
  const Part part = part_of(problem, centred);
  const Shares shares(problem, loops, threads, true);
  Totals totals(problem, shares, {dhidden, dweight, dbias});
  std::vector<float> shift(n), sum(n), target(n, kNaN);
  const RowSums sums = {shift.data(), sum.data(), target.data()};
  in_parallel(shares.parts, [&](std::size_t p) {
    loops.forward_backward[problem.bfloat16](part, shares.span(p), sums,
                                             totals.zeros(p, shares.span(p)));
  });
  totals.join();
  finish(problem, part, sums, 1, bits, lse);
  mark_rows(problem, part, lse, nullptr, dhidden);
}

}  // namespace fastmem
