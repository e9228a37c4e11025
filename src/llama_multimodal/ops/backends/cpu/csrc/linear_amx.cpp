// Linear layers of many rows on the matrix unit.
//
// A product of 32 by 32 values sums up in four registers. One factor lies as rows of 32 inputs, as tensors do; the other
// as pairs of inputs, whose rows lie side by side. Of x and a bf16 weight the smaller one is put into pairs, and the
// other is read as it lies. The values of a packed weight lie in fours already, so they become pairs.
//
// Shapes: T rows of x · K inputs · N outputs
#define LANES 16
#include <omp.h>

#include "amx.h"
#include "linear.h"
#include "pairs.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using llama_mm::PackedWeight;

constexpr int kSide = 16;  // of a tile
constexpr int kBoth = 32;  // rows of either factor at a time
constexpr int kStep = 32;  // inputs of one product
constexpr int64_t kTileValues = kSide * kStep;
constexpr int64_t kResident = int64_t{1} << 19;  // values that stay in the second cache: 1 MB, half of it on such CPUs
constexpr int64_t kBlocksTogether = 8;           // of 32 rows of x that should stay there together
constexpr int64_t kInputsTogether = 512;         // of 16 rows that a thread puts into pairs
constexpr int64_t kRowsAtOnce = 1024;            // of x that are in pairs at a time, if their sums are no more than
constexpr int64_t kMostSums = int64_t{1} << 22;  // these: 16 MB; but kLeastAtOnce
constexpr int64_t kLeastAtOnce = 256;
constexpr int64_t kRowsOfPart = 256;             // of x, for which a weight is put into pairs again
constexpr int64_t kFewRowsOfPart = 64;           // where threads had nothing to do otherwise

// sums [32, 32] = rows [16·ROWS, K] at a stride times pairs [K/32, 2, 16, 16, 2], of which PAIRS of the two are used;
// or are added to. ahead: what is read next, or null; as much as the rows.
template <int ROWS, int PAIRS>
INLINE void multiply(const uint16_t* rows, int64_t stride, const uint16_t* pairs, int64_t inputs, const char* ahead,
                     bool add, float* sums) {
  constexpr int64_t row = kBoth * sizeof(float);
  if (add)
    amx_load_sums(sums, row, PAIRS == 2, ROWS == 2);
  else
    amx_zero_sums();
  const uint16_t* const below = rows + kSide * stride;
  for (int64_t k = 0; k < inputs; k += kStep, pairs += 2 * kTileValues) {
    if (ahead) {
      for (int line = 0; line < ROWS * kSide; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
      ahead += ROWS * kSide * 64;
    }
    amx_add_products(rows + k, below + k, stride * 2, pairs, pairs + kTileValues, 64, PAIRS == 2, ROWS == 2);
  }
  amx_store_sums(sums, row, PAIRS == 2, ROWS == 2);
}

// Up to 32 of either.
void multiply_some(const uint16_t* rows, int64_t stride, int64_t row_count, const uint16_t* pairs, int64_t pair_count,
                   int64_t inputs, const char* ahead, bool add, float* sums) {
  if (row_count > kSide && pair_count > kSide) return multiply<2, 2>(rows, stride, pairs, inputs, ahead, add, sums);
  if (row_count > kSide) return multiply<2, 1>(rows, stride, pairs, inputs, ahead, add, sums);
  if (pair_count > kSide) return multiply<1, 2>(rows, stride, pairs, inputs, ahead, add, sums);
  multiply<1, 1>(rows, stride, pairs, inputs, ahead, add, sums);
}

INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Up to 16 rows, at a stride → one of the two tiles of each step of pairs.
void order_rows(const uint16_t* x, int64_t stride, int64_t count, int64_t inputs, uint16_t* out) {
  for (int64_t k = 0; k < inputs; k += kStep, out += 2 * kTileValues)
    order_pairs(x, stride, count, k, inputs, kSide, out);
}

// Rows that are there, then zeros up to 32: [32, K].
void pad_rows(const uint16_t* rows, int64_t count, int64_t inputs, uint16_t* out) {
  const int64_t values = count * inputs;
  memcpy(out, rows, static_cast<size_t>(values) * 2);
  memset(out + values, 0, static_cast<size_t>(kBoth * inputs - values) * 2);
}

// --- the weight as it lies, x in pairs --------------------------------------------------------------------------------

// sums [outputs, T] + bias [outputs] → out [T, …], up to 32 of either.
void put_transposed(const float* sums, const float* bias, int64_t rows, int64_t outputs, uint16_t* out,
                    int64_t stride) {
  const __mmask32 there = first_of_32(outputs);
  for (int64_t t = 0; t < rows; t += kSide, sums += kSide) {
    __m512i pairs[kSide];
    for (int i = 0; i < kSide; i++) {
      const float* const two = sums + 2 * i * kBoth;
      pairs[i] = pair_up(_mm512_add_ps(_mm512_loadu_ps(two), _mm512_set1_ps(bias[2 * i])),
                         _mm512_add_ps(_mm512_loadu_ps(two + kBoth), _mm512_set1_ps(bias[2 * i + 1])));
    }
    transpose(pairs);
    for (int64_t i = 0; i < kSide && t + i < rows; i++)
      _mm512_mask_storeu_epi16(out + (t + i) * stride, there, pairs[i]);
  }
}

// Long rows go in parts of the inputs, so that many of them stay in the cache: else all weights would be read again for
// each few rows. Sums wait for the next part then.
int multiply_by_x(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const float* bias,
                  int64_t outputs, uint16_t* out, int threads) {
  const int64_t blocks = (rows + kBoth - 1) / kBoth, panels = (outputs + kBoth - 1) / kBoth;
  const int64_t fit = most(kResident / (kBoth * least(blocks, kBlocksTogether)), int64_t{kStep});
  const int64_t parts = (inputs + fit - 1) / fit, of_part = rounded_up((inputs + parts - 1) / parts, kStep);
  const int64_t share = panels / (8 * threads) + 1;  // panels that a thread takes at once
  const int64_t shares = (panels + share - 1) / share, last = outputs % kBoth, of_sums = kBoth * kBoth;
  const int64_t resident = kResident / (kBoth * of_part), fair = blocks * shares / (2 * threads);
  const int64_t chunk = most(int64_t{1}, least(blocks, least(resident, fair)));  // blocks that stay in the cache
  const int64_t chunks = (blocks + chunk - 1) / chunk;
  const Scratch pairs_memory(blocks * kBoth * inputs * 2), last_memory(last ? kBoth * inputs * 2 : 1);
  const Scratch sums_memory((parts > 1 ? panels * blocks : threads) * of_sums * 4);
  if (!pairs_memory.memory || !last_memory.memory || !sums_memory.memory) return 1;
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(pairs_memory.memory);
  uint16_t* const last_panel = reinterpret_cast<uint16_t*>(last_memory.memory);
  float* const all_sums = reinterpret_cast<float*>(sums_memory.memory);
  if (last) pad_rows(weight + (outputs - last) * inputs, last, inputs, last_panel);
#pragma omp parallel num_threads(threads)
  {
    amx_begin();
    for (int64_t k = 0; k < inputs; k += of_part) {
      const int64_t some = least(inputs - k, of_part);
      uint16_t* const here = pairs + k * blocks * kBoth;  // [blocks, some/32, 2, 16, 16, 2]
#pragma omp for schedule(static) collapse(2)
      for (int64_t tile = 0; tile < (rows + kSide - 1) / kSide; tile++)
        for (int64_t from = 0; from < some; from += kInputsTogether)
          order_rows(x + tile * kSide * inputs + k + from, inputs, least(rows - tile * kSide, int64_t{kSide}),
                     least(some - from, kInputsTogether),
                     here + (tile / 2 * some + from) * kBoth + tile % 2 * kTileValues);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < chunks * shares; task++) {
        const int64_t first = task / shares * chunk, end = least(blocks, first + chunk);
        const int64_t panel_end = least(panels, task % shares * share + share);
        for (int64_t panel = task % shares * share; panel < panel_end; panel++) {
          const int64_t output = panel * kBoth, there = least(outputs - output, int64_t{kBoth});
          const uint16_t* const from = (there < kBoth ? last_panel : weight + output * inputs) + k;
          for (int64_t block = first; block < end; block++) {
            const int64_t row = block * kBoth, count = least(rows - row, int64_t{kBoth});
            const bool turns = block + 1 == end && parts == 1;  // to the next panel, which lies behind this one
            const char* const next = turns ? reinterpret_cast<const char*>(from + kBoth * inputs) : nullptr;
            float* const sums = all_sums + (parts > 1 ? panel * blocks + block : omp_get_thread_num()) * of_sums;
            multiply_some(from, inputs, there, here + row * some, count, some, next, k > 0, sums);
            if (k + some == inputs)
              put_transposed(sums, bias + output, count, there, out + row * outputs + output, outputs);
          }
        }
      }
    }
    amx_end();
  }
  return 0;
}

// --- x as it lies, the weight in pairs --------------------------------------------------------------------------------

// Stored values of one group and 16 outputs → what they stand for. Their bits become those of a number's fraction: of
// 128 + value for four bits and 256 + value for eight, which saves a conversion; nothing is rounded before bf16.
template <bool INT4>
struct Group {
  static constexpr int kOne = INT4 ? 16 : 15;  // where the lowest bit goes
  static constexpr float kMagic = INT4 ? 128.0f : 256.0f;
  __m512 scale, below;

  INLINE Group(const uint16_t* scales, const uint8_t* zeros) {
    scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    const __m512 zero = zeros ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros))))
                              : _mm512_set1_ps(INT4 ? 8.0f : 128.0f);
    below = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(-kMagic), zero), scale);
  }
  // The values whose lowest bit is the FROM-th of each lane.
  template <int FROM>
  INLINE __m512 value(__m512i stored) const {
    constexpr int left = kOne - FROM, mask = (INT4 ? 15 : 255) << kOne;
    const __m512i placed = left >= 0 ? _mm512_slli_epi32(stored, left) : _mm512_srli_epi32(stored, -left);
    const __m512i bits = _mm512_ternarylogic_epi32(placed, _mm512_set1_epi32(mask),
                                                   (__m512i)_mm512_set1_ps(kMagic), 0xea);  // (a & b) | c
    return _mm512_fmadd_ps((__m512)bits, scale, below);
  }
  // Four values of a lane, bytes apart, from the FIRST-th bit on → two rows of pairs.
  template <int FIRST>
  INLINE void put(__m512i stored, uint16_t* out) const {
    _mm512_storeu_si512(out, pair_up(value<FIRST>(stored), value<FIRST + 8>(stored)));
    _mm512_storeu_si512(out + 2 * kSide, pair_up(value<FIRST + 16>(stored), value<FIRST + 24>(stored)));
  }
};

// One tile's outputs → one of the two tiles of each step of pairs.
template <bool INT4>
void unpack_pairs(const PackedWeight& weight, int64_t tile, uint16_t* out) {
  constexpr int64_t bytes = kStep * kSide / (INT4 ? 2 : 1);
  const int64_t groups = weight.blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * weight.blocks * bytes;
  for (int64_t g = tile * groups; g < (tile + 1) * groups; g++) {
    const Group<INT4> group(weight.scales + g * kSide, weight.zeros ? weight.zeros + g * kSide : nullptr);
    for (int64_t block = 0; block < weight.blocks_per_group; block++, values += bytes, out += 2 * kTileValues)
      for (int i = 0; i < (INT4 ? 4 : 8); i++) {
        __builtin_prefetch(values + i * 64 + kBytesAhead, 0, 2);
        const __m512i stored = _mm512_loadu_si512(values + i * 64);
        uint16_t* const to = out + i * (INT4 ? 8 : 4) * kSide;
        group.template put<0>(stored, to);
        if (INT4) group.template put<INT4 ? 4 : 0>(stored, to + 4 * kSide);
      }
  }
}

// sums [T, outputs] + bias [outputs] → out [T, …], up to 32 of either.
void put_rows(const float* sums, const float* bias, int64_t rows, int64_t outputs, uint16_t* out, int64_t stride) {
  const __mmask32 there = first_of_32(outputs);
  const __m512 low = _mm512_loadu_ps(bias), high = _mm512_loadu_ps(bias + 16);
  for (int64_t t = 0; t < rows; t++, sums += kBoth, out += stride)
    _mm512_mask_storeu_epi16(out, there,
                             (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_loadu_ps(sums + 16), high),
                                                          _mm512_add_ps(_mm512_loadu_ps(sums), low)));
}

// fill(tile, to) puts 16 outputs' weights into one of the two tiles of each step.
template <typename Fill>
int multiply_by_weight(const uint16_t* x, int64_t rows, int64_t inputs, const float* bias, int64_t outputs,
                       uint16_t* out, int threads, Fill fill) {
  const int64_t panels = (outputs + kBoth - 1) / kBoth, tiles = (outputs + kSide - 1) / kSide;
  const int64_t fit = most(int64_t{1}, kResident / (kBoth * inputs));  // panels that stay in the cache
  const int64_t share = least(fit, panels / (4 * threads) + 1);  // that a thread takes at once
  const int64_t shares = (panels + share - 1) / share, last = rows % kBoth;
  // Rows are split too where there are few outputs, but filling is to be worth it.
  const bool few = shares * ((rows + kRowsOfPart - 1) / kRowsOfPart) < threads;
  const int64_t wanted = (4 * threads + shares - 1) / shares, of_part = few ? kFewRowsOfPart : kRowsOfPart;
  const int64_t part = rounded_up(most(of_part, (rows + wanted - 1) / wanted), kBoth);
  const int64_t parts = (rows + part - 1) / part;
  const Scratch pairs_memory(threads * share * kBoth * inputs * 2), last_memory(last ? kBoth * inputs * 2 : 1);
  if (!pairs_memory.memory || !last_memory.memory) return 1;
  uint16_t* const last_rows = reinterpret_cast<uint16_t*>(last_memory.memory);
  if (last) pad_rows(x + (rows - last) * inputs, last, inputs, last_rows);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float sums[kBoth * kBoth];
    uint16_t* const pairs = reinterpret_cast<uint16_t*>(pairs_memory.memory) +
                            omp_get_thread_num() * share * kBoth * inputs;
    amx_begin();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shares * parts; task++) {
      const int64_t first = task / parts * share, end = least(panels, first + share);
      const int64_t row_end = least(rows, (task % parts + 1) * part);
      for (int64_t tile = 2 * first; tile < least(tiles, 2 * end); tile++)
        fill(tile, pairs + (tile / 2 - first) * kBoth * inputs + tile % 2 * kTileValues);
      for (int64_t row = task % parts * part; row < row_end; row += kBoth) {
        const int64_t count = least(rows - row, int64_t{kBoth});
        const uint16_t* const from = count < kBoth ? last_rows : x + row * inputs;
        for (int64_t panel = first; panel < end; panel++) {
          const int64_t output = panel * kBoth, there = least(outputs - output, int64_t{kBoth});
          const uint16_t* const with = pairs + (panel - first) * kBoth * inputs;
          multiply_some(from, inputs, count, with, there, inputs, nullptr, false, sums);
          put_rows(sums, bias + output, count, there, out + row * outputs + output, outputs);
        }
      }
    }
    amx_end();
  }
  return 0;
}

// --- what the drivers call --------------------------------------------------------------------------------------------

int plain(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const float* bias, int64_t outputs,
          uint16_t* out, int threads) {
  if (rows <= outputs) {
    const int64_t most_rows = least(kRowsAtOnce, most(kLeastAtOnce, kMostSums / outputs / kBoth * kBoth));
    const int64_t times = (rows + most_rows - 1) / most_rows, at_once = rounded_up((rows + times - 1) / times, kBoth);
    for (int64_t row = 0; row < rows; row += at_once)
      if (multiply_by_x(x + row * inputs, least(rows - row, at_once), inputs, weight, bias, outputs,
                        out + row * outputs, threads))
        return 1;
    return 0;
  }
  return multiply_by_weight(x, rows, inputs, bias, outputs, out, threads, [=](int64_t tile, uint16_t* to) {
    order_rows(weight + tile * kSide * inputs, inputs, least(outputs - tile * kSide, int64_t{kSide}), inputs, to);
  });
}

int packed(const uint16_t* x, int64_t rows, int64_t inputs, const PackedWeight& weight, const float* bias,
           int64_t outputs, uint16_t* out, int threads) {
  return multiply_by_weight(x, rows, inputs, bias, outputs, out, threads, [&](int64_t tile, uint16_t* to) {
    weight.int4 ? unpack_pairs<true>(weight, tile, to) : unpack_pairs<false>(weight, tile, to);
  });
}

}  // namespace

namespace llama_mm {
extern const TileLinear kTileLinearAmx = {5, plain, 8, 24, packed};
}
