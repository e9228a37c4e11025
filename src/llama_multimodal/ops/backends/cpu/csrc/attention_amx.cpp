// Attention of many queries in bf16 on the matrix unit.
//
// Scores lie with a key in a row and a query in a lane, so that a query's largest score and sum take no step across
// lanes. While the softmax of some scores runs, the matrix unit is busy with the values of those before them and the
// scores behind them: it and the vectors each take about half of the time.
//
// Shapes: Q = 64 queries, in two halves · S keys · D head dim, Dp rounded up to 32
#define LANES 16
#include "amx.h"
#include "attention_pairs.h"

namespace {

using llama_mm::kHidden;
using llama_mm::KeyBlock;
using llama_mm::QueryGroup;

constexpr int kPadding = 32;  // a product sums 32 inputs
constexpr int kSide = 16;     // of a tile
constexpr int kHalf = 32;     // queries
constexpr int kSome = 128;    // keys whose scores are softened together
static_assert(kTile == 2 * kHalf && llama_mm::kKeys % kSome == 0 && kTile % 32 == 0, "what goes together");
constexpr int64_t kRow = kHalf * sizeof(float);  // bytes of scores or sums of half the queries

// Queries → [Q/16, Dp/2, 16, 2].
void order_queries(const void* q, int64_t stride, int64_t count, int64_t dim, void* out) {
  order_pairs_of_inputs(q, stride, count, dim, kPadding, out);
}

// kTile keys → [kTile, Dp].
void order_keys(const void* k, int64_t stride, int64_t count, int64_t dim, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t key = 0; key < kTile; key++)
    for (int64_t d = 0; d < llama_mm::padded_dim(dim, kPadding); d += 32, to += 32) {
      const uint16_t* row = static_cast<const uint16_t*>(k) + key * stride;
      _mm512_storeu_si512(to, key < count ? load_32(row, d, dim) : _mm512_setzero_si512());
    }
}

// kTile keys' values → [kTile/32, Dp/16, 16, 32 keys].
void order_values(const void* v, int64_t stride, int64_t count, int64_t dim, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t first = 0; first < kTile; first += 32)
    for (int64_t d = 0; d < llama_mm::padded_dim(dim, kPadding); d += kSide) {
      __m512i pairs[16];
      for (int i = 0; i < 16; i++) pairs[i] = pair_of_values(v, stride, first + 2 * i, count, d, dim);
      transpose(pairs);
      for (int i = 0; i < 16; i++, to += 32) _mm512_storeu_si512(to, pairs[i]);
    }
}

// scores [keys, 32] of half the queries, 32 keys at a time.
struct Scores {
  const uint16_t* q;
  const uint16_t* keys;
  float* scores;
  int64_t padded;
  int left;  // keys
  int64_t d = 0;

  // One step; false where none is left.
  INLINE bool step() {
    if (left <= 0) return false;
    if (d == 0) amx_zero_sums();
    amx_add_products(keys + d, keys + padded * kSide + d, padded * 2, q + d * kSide, q + (padded + d) * kSide, 64, true,
                     true);
    d += 32;
    if (d < padded) return true;
    amx_store_sums(scores, kRow, true, true);
    d = 0, left -= 32, keys += 32 * padded, scores += 32 * kHalf;
    return true;
  }
};

// acc [D, 32] += values times weights, 32 dims at a time. Pairs of keys' weights take the place of the first one's
// scores: bf16 [32, 2] in 128 of each 256 bytes.
struct Values {
  const float* weights;
  const uint16_t* values;
  float* acc;
  int64_t padded;
  int keys;
  int64_t left;  // dims
  int key = 0;

  INLINE bool step() {
    if (left <= 0) return false;
    const bool both = left > kSide;
    if (key == 0) amx_load_sums(acc, kRow, true, both);
    const uint16_t* const from = values + key * padded;
    const float* const pairs = weights + key * kHalf;
    amx_add_products(from, from + kSide * 32, 64, pairs, pairs + kSide, 2 * kRow, true, both);
    key += 32;
    if (key < keys) return true;
    amx_store_sums(acc, kRow, true, both);
    key = 0, left -= 2 * kSide, acc += 2 * kSide * kHalf, values += 2 * kSide * 32;
    return true;
  }
};

// What the matrix unit does meanwhile.
struct Work {
  Values values;
  Scores scores;
  INLINE bool step() { return values.step() || scores.step(); }
};

// Scores get their scale and bias, and those of later keys are hidden; first: the last key here that query 0 sees.
void scale_scores(float* scores, int keys, float scale, const float* bias, int first) {
  for (int key = 0; key < keys; key++)
    for (int t = 0; t < kHalf; t += 16, scores += 16) {
      const int hidden = key - first - t;  // queries
      const __mmask16 seen = hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : static_cast<__mmask16>(0xffff << hidden);
      const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores), _mm512_set1_ps(scale), _mm512_set1_ps(bias[key]));
      _mm512_storeu_ps(scores, _mm512_mask_blend_ps(seen, _mm512_set1_ps(2 * kHidden), x));
    }
}

// Scores, times `scale` → weights; the running maxima and sums go on, and older sums are brought down to them.
INLINE void soften(float* scores, int keys, float scale, float* max, float* sum, float* acc, int64_t dim, Work& work) {
  const __m512 times = _mm512_set1_ps(scale), hidden = _mm512_set1_ps(2 * kHidden);
  for (int t = 0; t < kHalf; t += 16, scores += 16, acc += 16) {
    __m512 tops[2] = {hidden, hidden};
    for (int key = 0; key < keys; key += 32) {
      work.step();
      for (int i = key; i < key + 32; i += 2)  // without NaNs: the weights will show them
        for (int odd = 0; odd < 2; odd++)
          tops[odd] = _mm512_max_ps(_mm512_loadu_ps(scores + (i + odd) * kHalf), tops[odd]);
    }
    const __m512 before = _mm512_loadu_ps(max + t), here = _mm512_mul_ps(_mm512_max_ps(tops[0], tops[1]), times);
    const __m512 top = _mm512_max_ps(_mm512_max_ps(here, hidden), before);
    const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_set1_ps(kHidden), _CMP_GT_OQ);
    const __m512 down = _mm512_maskz_mov_ps(some, top);
    // Exactly 1 where the largest stays, or old sums would grow from part to part.
    const __mmask16 stays = _mm512_cmp_ps_mask(before, down, _CMP_EQ_OQ);
    const __m512 factor = _mm512_mask_mov_ps(exp2_below(_mm512_sub_ps(before, down)), stays, _mm512_set1_ps(1.0f));
    __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int key = 0; key < keys; key += 16) {
      work.step();
      for (int i = key; i < key + 16; i += 2) {
        float* const pair = scores + i * kHalf;
        const __m512 low = exp2_below(_mm512_fmsub_ps(_mm512_loadu_ps(pair), times, down));
        const __m512 high = exp2_below(_mm512_fmsub_ps(_mm512_loadu_ps(pair + kHalf), times, down));
        totals[0] = _mm512_add_ps(totals[0], low);
        totals[1] = _mm512_add_ps(totals[1], high);
        _mm512_storeu_si512(pair, pair_up(low, high));
      }
    }
    _mm512_storeu_ps(max + t, top);
    _mm512_storeu_ps(sum + t, _mm512_fmadd_ps(_mm512_loadu_ps(sum + t), factor, _mm512_add_ps(totals[0], totals[1])));
    if (_mm512_cmpneq_ps_mask(factor, _mm512_set1_ps(1.0f)))
      for (int64_t d = 0; d < dim; d++)
        _mm512_storeu_ps(acc + d * kHalf, _mm512_mul_ps(_mm512_loadu_ps(acc + d * kHalf), factor));
  }
}

// Of half a group and kSome keys.
struct Part {
  const QueryGroup& group;
  const KeyBlock& block;
  int64_t padded;
  int half, first, keys;

  Part(const QueryGroup& group, const KeyBlock& block, int seen, int number)
      : group(group),
        block(block),
        padded(llama_mm::padded_dim(group.dim, kPadding)),
        half(number % 2),
        first(number / 2 * kSome),
        keys(least(seen - first, kSome)) {}

  float* acc() const { return group.acc + half * kHalf * padded; }
  Scores scores(float* to) const {
    return {static_cast<const uint16_t*>(group.q) + half * kHalf * padded,
            static_cast<const uint16_t*>(block.keys) + first * padded, to, padded, keys};
  }
  Values values(const float* weights) const {
    return {weights, static_cast<const uint16_t*>(block.values) + first * padded, acc(), padded, keys, group.dim};
  }
  void soften(float* scores, Work& work) const {
    const float* const bias = block.bias + first;
    const int causal = block.causal_from + half * kHalf - first;
    bool plain = causal >= keys;
    for (int key = 0; plain && key < keys; key += 16)
      plain = !_mm512_cmpneq_ps_mask(_mm512_loadu_ps(bias + key), _mm512_setzero_ps());
    if (!plain) scale_scores(scores, keys, group.scale, bias, causal);
    ::soften(scores, keys, plain ? group.scale : 1.0f, group.max + half * kHalf, group.sum + half * kHalf, acc(),
             group.dim, work);
  }
};

void attend(const QueryGroup& group, const KeyBlock& block) {
  alignas(64) float scores[2][kSome * kHalf];
  const int64_t seen = rounded_up(llama_mm::seen_keys(block, 2 * kHalf), kTile);
  const int parts = static_cast<int>((seen + kSome - 1) / kSome) * 2;
  const auto part = [&](int number) { return Part(group, block, static_cast<int>(seen), number); };
  Work work = {{}, part(0).scores(scores[0])};
  for (int i = 0; i < parts; i++) {
    while (work.step()) {
    }
    const Part now = part(i);
    float* const other = scores[(i + 1) % 2];
    if (i > 0) work.values = part(i - 1).values(other);
    if (i + 1 < parts) work.scores = part(i + 1).scores(other);
    now.soften(scores[i % 2], work);
  }
  while (work.step()) {
  }
  work.values = part(parts - 1).values(scores[(parts - 1) % 2]);
  while (work.step()) {
  }
}

// acc [D, 32] of each half → rows.
void put(const QueryGroup& group, int64_t count, void* out, int64_t stride) {
  const int64_t padded = llama_mm::padded_dim(group.dim, kPadding);
  uint16_t* const to = static_cast<uint16_t*>(out);
  for (int64_t t = 0; t < count; t += 16) {
    const float* const acc = group.acc + t / kHalf * kHalf * padded + t % kHalf;
    const __m512 sum = _mm512_loadu_ps(group.sum + t);
    const __mmask16 some = _mm512_cmpneq_ps_mask(sum, _mm512_setzero_ps());
    for (int64_t d = 0; d < group.dim; d += 16) {
      __m512i x[16];
      for (int64_t i = 0; i < 16; i++)
        x[i] = d + i < group.dim ? (__m512i)_mm512_maskz_div_ps(some, _mm512_loadu_ps(acc + (d + i) * kHalf), sum)
                                 : _mm512_setzero_si512();
      transpose(x);
      const __mmask16 there = group.dim - d < 16 ? static_cast<__mmask16>((1 << (group.dim - d)) - 1) : 0xffff;
      for (int64_t i = 0; i < 16 && t + i < count; i++)
        _mm256_mask_storeu_epi16(to + (t + i) * stride + d, there, (__m256i)_mm512_cvtneps_pbh((__m512)x[i]));
    }
  }
}

}  // namespace

namespace llama_mm {
extern const Attention kAttentionAmx = {2,          2 * kHalf,    4,      kPadding, order_queries,
                                        order_keys, order_values, attend, put,      amx_begin, amx_end};
}
