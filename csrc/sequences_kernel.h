// The loops that make tokens, written once; each instruction set's file includes them after its Vec.
//
// A Vec is kLanes 64-bit lanes, each at work on one block of Philox. A word is the low half of a
// lane; the high half may hold anything, since a multiplication reads low halves only. So a product
// serves as two words where it is: its low half, and moved down its high half.

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

  // Of n Vecs at once: a round waits longer for its products than it takes to start them.
  template <int n>
  void words(const Vec (&block)[n], Vec attempt, const Vec (&index)[n], Words (&out)[n]) const {
    Vec x0[n], x1[n], x2[n], x3[n];
    for (int i = 0; i < n; ++i) {
      x0[i] = block[i];
      x1[i] = attempt;
      x2[i] = index[i];
      x3[i] = high_half(index[i]);
    }
    for (const Vec(&key)[2] : keys)
      for (int i = 0; i < n; ++i) {
        const Vec even = times(x0[i], even_factor), odd = times(x2[i], odd_factor);
        x0[i] = xor_all(high_half(odd), x1[i], key[0]);
        x1[i] = odd;
        x2[i] = xor_all(high_half(even), x3[i], key[1]);
        x3[i] = even;
      }
    for (int i = 0; i < n; ++i) out[i] = {{x0[i], x1[i], x2[i], x3[i]}};
  }
};

// The (block, index) that each lane is at work on, kLanes blocks further each time.
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
    // Lanes beyond the end are at work for nothing, but must not read there.
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

// Two Vecs of pairs of words, or of quarters of a block, to memory in the order of blocks.
inline void store_in_order(Vec first, Vec second, void* out) {
  interleave_low(first, second).store(out);
  interleave_high(first, second).store(static_cast<char*>(out) + sizeof(Vec));
}

// Each rule below makes the Units of kLanes blocks; a Unit is the least that holds a token.

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
    if (any_low_half_below(m, threshold)) draw_again(rounds, block, index, m);
    if constexpr (sizeof(Unit) == 2)
      in_order(quarters(m[0], m[1], m[2], m[3])).store(out);
    else
      store_in_order(high_halves(m[0], m[1]), high_halves(m[2], m[3]), out);
  }

  [[gnu::noinline]] void draw_again(const Rounds& rounds, Vec block, Vec index, Vec (&m)[4]) const {
    for (std::uint32_t attempt = 1; any_low_half_below(m, threshold); ++attempt) {
      Words again[1];
      rounds.words({block}, Vec::all(attempt), {index}, again);
      for (int k = 0; k < 4; ++k)
        m[k] = if_low_half_below(m[k], threshold, times(again[0].w[k], vocab), m[k]);
    }
  }
};

// Weights: the words, which become tokens one by one.
struct Guided {
  using Unit = std::uint32_t;
  static constexpr int kTokens = 4;

  explicit Guided(const TokenRule&) {}

  void units(const Words& words, const Rounds&, Vec, Vec, Unit* out) const {
    const auto& w = words.w;
    store_in_order(low_halves(w[0], w[1]), low_halves(w[2], w[3]), out);
  }
};

// The Units of `blocks` to `out`, leaving out those past the ends of sequences.
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
void fill_by_rule(const Fill& fill, Blocks blocks, Token* out) {
  using Unit = typename Rule::Unit;
  constexpr int kTokens = Rule::kTokens;
  constexpr bool kGuided = std::is_same_v<Rule, Guided>;
  constexpr std::uint64_t kBatch = 64;  // blocks; their units stay in the first-level cache
  static_assert(kBatch % (Vec::kAtOnce * Vec::kLanes) == 0);
  alignas(64) Unit buffer[kBatch * kTokens];

  if (blocks.begin == blocks.end) return;
  const Rounds rounds(fill.rule.seed);
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
      }
      rounds.words(block, Vec::all(0), index, words);
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
