#include "gpt/gpt.h"

#include "gpt/part.h"
#include "likelihood/likelihood.h"
#include "likelihood/shares.h"

namespace fastmem {
namespace {

const GptLoops& loops_of(Isa isa) {
  return isa == Isa::avx512 ? kAvx512Gpt : isa == Isa::avx2 ? kAvx2Gpt : kPortableGpt;
}

// Tokens of a panel: enough to reuse each weight that is read, and few enough that a panel of a
// small model stays in the second-level cache.
constexpr std::size_t kPanelTokens = 64;

// Tokens that the output layer takes at a time: fewer if their activations take more floats.
constexpr std::size_t kChunkTokens = 1024, kChunkFloats = std::size_t{1} << 22;

std::size_t up_to(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace

Net::Net(const Gpt& problem, std::size_t lanes_of_vector, bool keep)
    : layers(problem.layers),
      width(problem.width),
      heads(problem.heads),
      time(problem.time),
      vector(lanes_of_vector),
      apart(up_to(problem.time, lanes_of_vector)) {
  sequences = std::max<std::size_t>(1, std::min(problem.batch, kPanelTokens / apart));
  lanes = sequences * apart;
  std::size_t at = 0;
  // Rows of a matrix are padded to whole vectors, except embeddings, to which single rows are
  // added.
  const auto tensor = [&](std::size_t rows, std::size_t columns, std::size_t stride) {
    tensors.push_back({rows, columns, at, sum_floats, stride});
    at += rows * columns;
    sum_floats += up_to(rows * stride, vector);
  };
  const auto matrix = [&](std::size_t rows, std::size_t columns) {
    tensor(rows, columns, up_to(columns, vector));
    tensor(rows, 1, vector);
  };
  const auto norm = [&] {
    tensor(width, 1, vector);
    tensor(width, 1, vector);
  };
  tensor(problem.vocab, width, width);
  tensor(problem.length, width, width);
  for (std::size_t l = 0; l < layers; ++l) {
    norm();
    matrix(3 * width, width);
    matrix(width, width);
    norm();
    matrix(4 * width, width);
    matrix(width, 4 * width);
  }
  norm();

  std::size_t exp_logit_vectors = 0;
  for (std::size_t query = 0; query < apart; query += vector)
    exp_logit_vectors += std::min(time, query + vector);
  const std::size_t layer =
      (14 * width + heads + 2) * lanes + sequences * heads * exp_logit_vectors * vector;
  layer_apart = keep ? layer : 0;
  panel_floats = layers * layer_apart + (keep ? (width + 1) * lanes : layer);
  forward_floats = 2 * width * lanes;
  backward_floats =
      (7 * width + up_to(4 * width, vector)) * lanes + time * vector + vector * vector;
}

namespace {

// One thread's part of one model: consecutive panels.
struct Run {
  std::size_t model, first, last;  // panels
  std::size_t slot;                // number of earlier runs of the model
};

// Panels of all models, laid end to end and cut into parts of about equal length. The cuts depend
// on the arguments alone.
std::vector<std::vector<Run>> shared_out(const Gpt& problem, const Net& net, std::size_t threads,
                                         double work_factor) {
  const std::size_t panels = (problem.batch + net.sequences - 1) / net.sequences;
  const std::size_t all = problem.models * panels;
  const double work = work_factor * static_cast<double>(problem.parameter_count()) *
                      static_cast<double>(all) * static_cast<double>(net.lanes);
  const auto most =
      static_cast<std::size_t>(std::min(static_cast<double>(all), work / kLeastWorkPerThread));
  const std::size_t least = std::min<std::size_t>(all, 1);
  std::vector<std::vector<Run>> parts(std::max(least, std::min(threads, most)));
  std::vector<std::size_t> slots(problem.models);
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::size_t end = edge(all, parts.size(), p + 1);
    for (std::size_t at = edge(all, parts.size(), p); at < end;) {
      const std::size_t model = at / panels, first = model * panels;
      const std::size_t to = std::min(end, first + panels);
      parts[p].push_back({model, at - first, to - first, slots[model]++});
      at = to;
    }
  }
  return parts;
}

// The output layer of some rows of a model.
Likelihood head(const Gpt& problem, std::size_t model, std::size_t rows, const float* hidden,
                const std::int64_t* targets) {
  const float* const embedding = problem.parameters + model * problem.parameter_count();
  return {1,     rows,    problem.width, problem.vocab, hidden, embedding,
          false, targets, nullptr,       0,             1,      -1};
}

// One thread's memory, and its passes over a few panels.
class Worker {
 public:
  Worker(const Gpt& problem, const Net& net, Isa isa, bool gradients)
      : problem_(problem),
        net_(net),
        loops_(loops_of(isa)),
        isa_(isa),
        panels_(std::max<std::size_t>(
            1, std::min(kChunkTokens / (net.sequences * net.time),
                        gradients ? kChunkFloats / net.panel_floats : kChunkTokens))),
        rows_(panels_ * net.sequences * net.time),
        keep_(gradients),
        kept_((gradients ? panels_ : 1) * net.panel_floats),
        scratch_(std::max(net.forward_floats, gradients ? net.backward_floats : 0)),
        hidden_(rows_ * net.width),
        dhidden_(gradients ? rows_ * net.width : 0),
        dweight_(gradients ? problem.vocab * net.width : 0),
        bits_(gradients ? rows_ : 0),
        lse_(rows_),
        targets_(rows_) {}

  // Calls f() for each chunk of the run's panels.
  template <class F>
  void for_each_chunk(const Run& run, const F& f) {
    for (std::size_t panel = run.first; panel < run.last; panel += panels_) {
      first_ = panel * net_.sequences;
      last_ = std::min(problem_.batch, std::min(run.last, panel + panels_) * net_.sequences);
      model_ = run.model;
      f();
    }
  }

  void write_bits(float* bits) {
    forward();
    fastmem::token_bits(likelihood(), 1, isa_,
                        bits + (model_ * problem_.batch + first_) * net_.time, lse_.data());
  }

  // Adds gradients to `sums` and bits to `loss`.
  void add_gradients(float* sums, double& loss) {
    forward();
    token_bits_and_gradients(likelihood(), 1, isa_, bits_.get(), lse_.data(), dhidden_.get(),
                             dweight_.get(), nullptr);
    for (std::size_t row = 0; row < (last_ - first_) * net_.time; ++row) loss += bits_[row];
    float* const embedding = sums + net_.embedding().sum_at;
    for (std::size_t i = 0; i < problem_.vocab * net_.width; ++i) embedding[i] += dweight_[i];
    for_each_panel([&](const GptPanel& panel, std::size_t row) {
      loops_.backward(net_, panel, dhidden_.get() + row * net_.width, sums);
    });
  }

 private:
  void forward() {
    for_each_panel([&](const GptPanel& panel, std::size_t row) {
      loops_.forward(net_, panel, hidden_.get() + row * net_.width);
      for (std::size_t s = 0; s < panel.sequences; ++s)
        std::copy_n(panel.tokens + s * (net_.time + 1) + 1, net_.time,
                    targets_.data() + row + s * net_.time);
    });
  }

  // Calls f(panel, first row of the panel in the chunk).
  template <class F>
  void for_each_panel(const F& f) {
    float* kept = kept_.get();
    for (std::size_t first = first_; first < last_; first += net_.sequences) {
      const std::size_t count = std::min(net_.sequences, last_ - first);
      f(GptPanel{problem_.parameters + model_ * problem_.parameter_count(),
                 problem_.tokens + (model_ * problem_.batch + first) * (net_.time + 1), count,
                 kept, scratch_.get()},
        (first - first_) * net_.time);
      if (keep_) kept += net_.panel_floats;
    }
  }

  Likelihood likelihood() const {
    return head(problem_, model_, (last_ - first_) * net_.time, hidden_.get(), targets_.data());
  }

  const Gpt& problem_;
  const Net& net_;
  const GptLoops& loops_;
  Isa isa_;
  std::size_t panels_, rows_;  // the most of a chunk
  bool keep_;                  // keeps each panel for its backward pass
  Floats kept_, scratch_, hidden_, dhidden_, dweight_, bits_;
  std::vector<double> lse_;
  std::vector<std::int64_t> targets_;
  std::size_t model_ = 0, first_ = 0, last_ = 0;  // the chunk: sequences of a model
};

// out = scale times the sum of `sums`, which have the layout of Net.
void join(const GptTensor& tensor, std::size_t vector, const std::vector<Floats>& sums, float scale,
          float* out) {
  const std::size_t added = tensor.columns == 1 ? std::min(tensor.stride, vector) : 1;
  for (std::size_t row = 0; row < tensor.rows; ++row, out += tensor.columns) {
    std::fill_n(out, tensor.columns, 0.F);
    for (const Floats& sum : sums) {
      const float* const from = sum.get() + tensor.sum_at + row * tensor.stride;
      for (std::size_t column = 0; column < tensor.columns; ++column) out[column] += from[column];
      for (std::size_t lane = 1; lane < added; ++lane) *out += from[lane];
    }
    for (std::size_t column = 0; column < tensor.columns; ++column) out[column] *= scale;
  }
}

}  // namespace

void gpt_bits(const Gpt& problem, std::size_t threads, Isa isa, float* bits) {
  const Net net(problem, loops_of(isa).lanes, false);
  const auto parts = shared_out(problem, net, threads, 1);
  in_parallel(parts.size(), [&](std::size_t part) {
    Worker worker(problem, net, isa, false);
    for (const Run& run : parts[part]) worker.for_each_chunk(run, [&] { worker.write_bits(bits); });
  });
}

void gpt_gradients(const Gpt& problem, std::size_t threads, Isa isa, double* losses,
                   float* gradients) {
  const Net net(problem, loops_of(isa).lanes, true);
  const auto parts = shared_out(problem, net, threads, 3);
  const double scale = 1 / (static_cast<double>(problem.batch) * static_cast<double>(problem.time));
  std::vector<std::vector<Floats>> sums(problem.models);
  std::vector<std::vector<double>> bits(problem.models);
  for (const auto& part : parts)
    for (const Run& run : part) {
      sums[run.model].resize(run.slot + 1);
      bits[run.model].resize(run.slot + 1);
    }
  const auto write_gradient = [&](std::size_t model) {
    for (const GptTensor& tensor : net.tensors)
      join(tensor, net.vector, sums[model], static_cast<float>(scale),
           gradients + model * problem.parameter_count() + tensor.at);
    sums[model].clear();
  };
  in_parallel(parts.size(), [&](std::size_t part) {
    Worker worker(problem, net, isa, true);
    for (const Run& run : parts[part]) {
      Floats sum(net.sum_floats);
      std::fill_n(sum.get(), net.sum_floats, 0.F);
      worker.for_each_chunk(
          run, [&] { worker.add_gradients(sum.get(), bits[run.model][run.slot]); });
      sums[run.model][run.slot] = std::move(sum);
      if (sums[run.model].size() == 1) write_gradient(run.model);
    }
  });
  for (std::size_t e = 0; e < problem.models; ++e) {
    double total = 0;
    for (const double part : bits[e]) total += part;
    losses[e] = total * scale;
    if (!sums[e].empty()) write_gradient(e);
  }
}

}  // namespace fastmem
