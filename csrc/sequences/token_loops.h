// The loops that make tokens. The file of each instruction set defines Vec and includes this file.
//
// A Vec is kLanes 64-bit lanes, each of which makes one block of Philox. A word is the low half of
// a lane; the high half may hold anything, since a multiplication reads low halves only. So a
// product holds two words without a move: its low half, and its high half once shifted down.

namespace fastmem {
namespace {

inline Vec high_half(Vec a) { return shift_right<32>(a); }

struct Words {
  Vec w[4];
};

// Philox's multipliers and round keys.
struct Rounds {
  Vec even_factor = Vec::all(0xD2511F53), odd_factor = Vec::all(0xCD9E8D57);
  Vec keys[10][2];

  explicit Rounds(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (Vec(&key)[2] : keys) {
      key[0] = Vec::all(k0);
      key[1] = Vec::all(k1);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }

  // Rounds `first` to 9 of n Vecs at once: a round waits longer for its products than it takes to
  // start them.
  template <int first, int n>
  void finish(Words (&x)[n]) const {
    for (int round = first; round < 10; ++round)
      for (auto& [w] : x) {
        const Vec even = times(w[0], even_factor), odd = times(w[2], odd_factor);
        w[0] = xor_all(high_half(odd), w[1], keys[round][0]);
        w[1] = odd;
        w[2] = xor_all(high_half(even), w[3], keys[round][1]);
        w[3] = even;
      }
  }

  Words begin(Vec block, Vec attempt, Vec index) const {
    return {{block, attempt, index, high_half(index)}};
  }
};

// Rounds 1 and 2 of sequences whose blocks fill whole Vecs. Each word is the xor of a word that
// depends on the block, kept here for all sequences with one high word of the index, and of a word
// that depends on the index.
class WholeSequences {
 public:
  static constexpr int kLanes = Vec::kLanes;
  static constexpr std::uint64_t kMostBlocks = 64;

  WholeSequences(const Rounds& rounds, std::uint64_t blocks)
      : rounds_(rounds), vecs_(static_cast<int>(blocks / kLanes)) {}

  int vecs() const { return vecs_; }

  // Prepares the sequences of kLanes indices; false if their high words differ.
  bool take(Vec index) {
    index.store(of_indices_.index);
    std::uint64_t others = 0;
    for (const std::uint64_t i : of_indices_.index) others |= i ^ of_indices_.index[0];
    if (others >> 32 != 0) return false;
    if (of_indices_.index[0] >> 32 != high_) of_high_word(of_indices_.index[0] >> 32);
    const Vec w0 = times(index, rounds_.odd_factor);
    const Vec w3 = times(high_half(w0) ^ rounds_.keys[0][0], rounds_.even_factor);
    w0.store(of_indices_.w0);
    (high_half(w3) ^ rounds_.keys[1][1]).store(of_indices_.w2);
    w3.store(of_indices_.w3);
    return true;
  }

  Vec block(int vec) const { return of_blocks_[vec].block; }
  Vec index(int i) const { return Vec::all(of_indices_.index[i]); }

  Words words(int i, int vec) const {
    const OfBlocks& of = of_blocks_[vec];
    return {{of.w0 ^ Vec::all(of_indices_.w0[i]), of.w1, of.w3 ^ Vec::all(of_indices_.w2[i]),
             Vec::all(of_indices_.w3[i])}};
  }

 private:
  struct OfBlocks {
    Vec block, w0, w1, w3;
  };
  struct OfIndices {
    alignas(64) std::uint64_t index[kLanes], w0[kLanes], w2[kLanes], w3[kLanes];
  };

  void of_high_word(std::uint64_t high) {
    high_ = high;
    std::uint64_t block[kLanes];
    for (int vec = 0; vec < vecs_; ++vec) {
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = vec * kLanes + kOrder[lane];
      OfBlocks& of = of_blocks_[vec];
      of.block = Vec::load(block);
      of.w3 = times(of.block, rounds_.even_factor);
      const Vec w2 = xor_all(high_half(of.w3), Vec::all(high), rounds_.keys[0][1]);
      of.w1 = times(w2, rounds_.odd_factor);
      of.w0 = high_half(of.w1) ^ rounds_.keys[1][0];
    }
  }

  const Rounds& rounds_;
  int vecs_;
  std::uint64_t high_ = ~std::uint64_t{0};
  OfBlocks of_blocks_[kMostBlocks / kLanes];
  OfIndices of_indices_;
};

// The (block, index) of each lane; next() moves on by kLanes blocks.
class Places {
 public:
  Places(const Fill& fill, std::uint64_t blocks, std::uint64_t first, std::uint64_t end)
      : indices_(fill.indices),
        first_sequence_(first / blocks),
        first_block_(first % blocks),
        last_sequence_((end - 1) / blocks),
        blocks_(blocks),
        sequences_a_step_(kLanes / blocks),
        blocks_a_step_(kLanes % blocks) {
    std::uint64_t block[kLanes], sequence[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      block[lane] = (first_block_ + kOrder[lane]) % blocks;
      sequence[lane] = first_sequence_ + (first_block_ + kOrder[lane]) / blocks;
      if (!indices_) sequence[lane] += fill.begin;
    }
    block_ = Vec::load(block);
    sequence_ = Vec::load(sequence);
  }

  Vec block() const { return block_; }

  Vec index() const {
    if (!indices_) return sequence_;
    // Lanes past the end make tokens that are dropped, and must not read past the indices.
    if (first_block_ + kLanes <= blocks_)
      return Vec::all(indices_[std::min(first_sequence_, last_sequence_)]);
    return gather(indices_, at_most(sequence_, Vec::all(last_sequence_)));
  }

  void next() {
    block_ = block_ + Vec::all(blocks_a_step_);
    sequence_ = sequence_ + Vec::all(sequences_a_step_);
    wrap(block_, sequence_, Vec::all(blocks_));
    first_block_ += blocks_a_step_;
    first_sequence_ += sequences_a_step_;
    if (first_block_ >= blocks_) {
      first_block_ -= blocks_;
      ++first_sequence_;
    }
  }

 private:
  static constexpr int kLanes = Vec::kLanes;
  Vec block_, sequence_;
  const std::uint64_t* indices_;
  std::uint64_t first_sequence_, first_block_;  // of lane 0
  std::uint64_t last_sequence_, blocks_, sequences_a_step_, blocks_a_step_;
};

// Stores two Vecs of pairs of words, or of quarters of a block, in the order of blocks.
inline void store_in_order(Vec first, Vec second, void* out) {
  interleave_low(first, second).store(out);
  interleave_high(first, second).store(static_cast<char*>(out) + sizeof(Vec));
}

// Each rule below makes the Units of kLanes blocks; a Unit is the narrowest integer for a token.

// V a power of two, at most 65536: the words themselves, masked.
struct Halves {
  using Unit = std::uint16_t;
  static constexpr int kTokens = 8;
  Vec mask;

  explicit Halves(const TokenRule& rule)
      : mask(Vec::all(std::uint64_t{0x0001000100010001} * (rule.vocab - 1))) {}

  void units(const Words& words, const Rounds&, Vec, Vec, Unit* out) const {
    const auto& w = words.w;
    store_in_order(low_halves(w[0], w[1]) & mask, low_halves(w[2], w[3]) & mask, out);
  }
};

// Any other V.
template <class T>
struct Products {
  using Unit = T;
  static constexpr int kTokens = 4;
  Vec vocab, threshold;

  explicit Products(const TokenRule& rule)
      : vocab(Vec::all(rule.vocab)), threshold(Vec::all((0 - rule.vocab) % rule.vocab)) {}

  void units(const Words& words, const Rounds& rounds, Vec block, Vec index, Unit* out) const {
    Vec m[4];
    for (int k = 0; k < 4; ++k) m[k] = times(words.w[k], vocab);
    if (any_low_half_below(m, threshold)) {
      Vec drawn[4];  // a copy in memory keeps m in registers
      std::copy(m, m + 4, drawn);
      draw_again(rounds, block, index, drawn);
      std::copy(drawn, drawn + 4, m);
    }
    if constexpr (sizeof(Unit) == 2)
      quarters_in_order(m).store(out);
    else
      store_in_order(high_halves(m[0], m[1]), high_halves(m[2], m[3]), out);
  }

  [[gnu::noinline]] void draw_again(const Rounds& rounds, Vec block, Vec index, Vec (&m)[4]) const {
    for (std::uint32_t attempt = 1; any_low_half_below(m, threshold); ++attempt) {
      Words again[1] = {rounds.begin(block, Vec::all(attempt), index)};
      rounds.finish<0>(again);
      for (int k = 0; k < 4; ++k)
        m[k] = if_low_half_below(m[k], threshold, times(again[0].w[k], vocab), m[k]);
    }
  }
};

// Weights: the words, which Guide turns into tokens one by one.
struct Guided {
  using Unit = std::uint32_t;
  static constexpr int kTokens = 4;

  explicit Guided(const TokenRule&) {}

  void units(const Words& words, const Rounds&, Vec, Vec, Unit* out) const {
    const auto& w = words.w;
    store_in_order(low_halves(w[0], w[1]), low_halves(w[2], w[3]), out);
  }
};

// Copies the Units of `blocks` to `out`, except those past the ends of sequences.
template <class Rule, class Token>
Token* place(const typename Rule::Unit* units, Blocks blocks, std::uint64_t a_sequence, int tail,
             Token* out) {
  std::uint64_t block = blocks.begin % a_sequence, left = blocks.end - blocks.begin;
  while (left > 0) {
    const std::uint64_t run = std::min(left, a_sequence - block);
    block += run;
    left -= run;
    std::size_t tokens = run * Rule::kTokens;
    if (block == a_sequence) {
      tokens -= Rule::kTokens - tail;
      block = 0;
    }
    for (std::size_t i = 0; i < tokens; ++i) out[i] = static_cast<Token>(units[i]);
    out += tokens;
    units += run * Rule::kTokens;
  }
  return out;
}

template <class Rule, class Token>
Token* fill_any(const Fill& fill, const Rounds& rounds, Blocks blocks, Token* out) {
  using Unit = typename Rule::Unit;
  constexpr int kTokens = Rule::kTokens;
  constexpr bool kGuided = std::is_same_v<Rule, Guided>;
  constexpr std::uint64_t kBatch = 64;  // blocks, whose units stay in the first-level cache
  static_assert(kBatch % (Vec::kAtOnce * Vec::kLanes) == 0);
  alignas(64) Unit buffer[kBatch * kTokens];

  if (blocks.begin == blocks.end) return out;
  const Rule rule(fill.rule);
  const std::uint64_t a_sequence = (fill.rule.length - 1) / kTokens + 1;
  const int tail = static_cast<int>(fill.rule.length - (a_sequence - 1) * kTokens);
  const bool as_they_are = !kGuided && sizeof(Token) == sizeof(Unit) && tail == kTokens;
  Places places(fill, a_sequence, blocks.begin, blocks.end);
  while (blocks.begin < blocks.end) {
    const std::uint64_t n = std::min(kBatch, blocks.end - blocks.begin);
    const bool straight = as_they_are && n == kBatch;
    Unit* const units = straight ? reinterpret_cast<Unit*>(out) : buffer;
    for (std::uint64_t b = 0; b < n; b += Vec::kAtOnce * Vec::kLanes) {
      Vec block[Vec::kAtOnce], index[Vec::kAtOnce];
      Words words[Vec::kAtOnce];
      for (int i = 0; i < Vec::kAtOnce; ++i, places.next()) {
        block[i] = places.block();
        index[i] = places.index();
        words[i] = rounds.begin(block[i], Vec::all(0), index[i]);
      }
      rounds.finish<0>(words);
      for (int i = 0; i < Vec::kAtOnce; ++i)
        rule.units(words[i], rounds, block[i], index[i],
                   units + (b + i * Vec::kLanes) * kTokens);
    }
    if constexpr (kGuided)
      for (std::uint64_t i = 0; i < n * kTokens; ++i)
        buffer[i] = fill.guide->token(buffer[i], count_at_most);
    out = straight ? out + n * kTokens
                   : place<Rule>(buffer, {blocks.begin, blocks.begin + n}, a_sequence, tail, out);
    blocks.begin += n;
  }
  return out;
}

// Sequences begin, ..., end - 1: a multiple of kLanes, whose blocks fill Vecs and whose Units are
// all tokens.
template <class Rule, class Token>
Token* fill_whole(const Fill& fill, const Rounds& rounds, std::uint64_t begin, std::uint64_t end,
                  Token* out) {
  using Unit = typename Rule::Unit;
  constexpr int kAtOnce = Vec::kAtOnce, kLanes = Vec::kLanes;
  constexpr std::uint64_t kMostBlocks = WholeSequences::kMostBlocks;
  alignas(64) Unit buffer[kLanes * kMostBlocks * Rule::kTokens];

  const Rule rule(fill.rule);
  const std::uint64_t length = fill.rule.length, blocks = length / Rule::kTokens;
  WholeSequences whole(rounds, blocks);
  std::uint64_t first[kLanes];
  std::iota(first, first + kLanes, fill.begin);
  const Vec from_begin = Vec::load(first);
  for (; begin < end; begin += kLanes) {
    if (!whole.take(fill.indices ? Vec::load(fill.indices + begin)
                                 : from_begin + Vec::all(begin))) {
      out = fill_any<Rule>(fill, rounds, {begin * blocks, (begin + kLanes) * blocks}, out);
      continue;
    }
    Unit* const units = sizeof(Token) == sizeof(Unit) ? reinterpret_cast<Unit*>(out) : buffer;
    for (int vec = 0; vec < whole.vecs(); ++vec)
      for (int first = 0; first < kLanes; first += kAtOnce) {
        Words words[kAtOnce];
        for (int i = 0; i < kAtOnce; ++i) words[i] = whole.words(first + i, vec);
        rounds.finish<2>(words);
        for (int i = 0; i < kAtOnce; ++i)
          rule.units(words[i], rounds, whole.block(vec), whole.index(first + i),
                     units + (first + i) * length + vec * kLanes * Rule::kTokens);
      }
    if constexpr (sizeof(Token) != sizeof(Unit))
      for (std::uint64_t t = 0; t < kLanes * length; ++t) out[t] = static_cast<Token>(units[t]);
    out += kLanes * length;
  }
  return out;
}

template <class Rule, class Token>
void fill_by_rule(const Fill& fill, Blocks blocks, Token* out) {
  const Rounds rounds(fill.rule.seed);
  const std::uint64_t a_sequence = (fill.rule.length - 1) / Rule::kTokens + 1;
  if constexpr (!std::is_same_v<Rule, Guided>)
    if (fill.rule.length % (Vec::kLanes * Rule::kTokens) == 0 &&
        a_sequence <= WholeSequences::kMostBlocks) {
      const std::uint64_t begin = (blocks.begin + a_sequence - 1) / a_sequence;
      const std::uint64_t whole = blocks.end / a_sequence;
      if (whole >= begin + Vec::kLanes) {
        const std::uint64_t end = whole - (whole - begin) % Vec::kLanes;
        out = fill_any<Rule>(fill, rounds, {blocks.begin, begin * a_sequence}, out);
        out = fill_whole<Rule>(fill, rounds, begin, end, out);
        blocks.begin = end * a_sequence;
      }
    }
  fill_any<Rule>(fill, rounds, blocks, out);
}

template <class Token>
void fill_part(const Fill& fill, Blocks blocks, Token* out) {
  if (fill.guide)
    fill_by_rule<Guided>(fill, blocks, out);
  else if (of_halves(fill.rule))
    fill_by_rule<Halves>(fill, blocks, out);
  else
    fill_by_rule<Products<std::conditional_t<sizeof(Token) == 2, std::uint16_t, std::uint32_t>>>(
        fill, blocks, out);
}

constexpr SequenceLoops kLoops = {fill_part<std::uint16_t>, fill_part<std::uint32_t>,
                                  fill_part<std::int64_t>};

}  // namespace
}  // namespace fastmem
