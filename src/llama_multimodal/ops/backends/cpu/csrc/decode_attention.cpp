// Attention of one query a row and head over a dense cache, a paged cache or a range of packed vision tokens.
//
// A task is one row, one key head and one part of its keys; the query heads that share a key head read it together. Where
// a token's key heads lie side by side, a task is all of them, a few keys at a time, so that memory is read as it lies.
// Keys are split into parts only where threads would be idle otherwise, or wait for one long row.
//
// Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
// M blocks of a row, at most
#include <cmath>
#include <cstdlib>

#include "drivers.h"
#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kLeastPart = 128;  // keys; fewer are not worth a part of their own
constexpr int kNoMemory = -1;

struct Problem {
  const void* q;  // [B, H, D], contiguous
  void* out;      // the same
  DType dtype;
  int64_t rows, heads, kv_heads, dim;
  int threads;
  DType cache;  // of keys and values
};

// How tasks are cut: `parts` of a row's keys, `together` key heads.
struct Cut {
  int threads;
  int64_t parts, together;
};

template <typename Layout>
Cut cut(const Problem& p, const Layout& layout) {
  int64_t longest = 0, total = 0;
  for (int64_t row = 0; row < p.rows; row++) {
    longest = most(longest, layout.count(row));
    total += layout.count(row);
  }
  const int threads = total * p.kv_heads * p.dim * 2 * bytes_of(p.cache) < kBytesPerThread ? 1 : p.threads;
  const int64_t pairs = p.rows * p.kv_heads, worth_it = most(int64_t{1}, longest / kLeastPart);
  if (Layout::kHeadsSideBySide && total > 0) {
    // A part is to be an eighth of what a thread does, at most.
    const int64_t wanted = threads == 1 ? 1 : (8 * threads * longest + total - 1) / total;
    const int64_t parts = least(wanted, worth_it);
    if (p.rows * parts >= threads) return {threads, parts, p.kv_heads};
  }
  if (pairs >= 4 * threads || pairs % threads == 0) return {threads, 1, 1};
  return {threads, least((4 * threads + pairs - 1) / pairs, worth_it), 1};
}

// Keys [first, end) or as many as go at once, of one head.
template <typename Layout>
void find(const Layout& layout, int64_t row, int64_t head, int64_t first, int64_t end, Keys& keys) {
  keys.count = static_cast<int>(least(end - first, int64_t{kKeysAtOnce}));
  keys.bias = nullptr;
  if (keys.count > 0) layout.find(row, head, first, keys);
}

// The softmax of every row and key head ("pair") over every part of its keys.
struct States {
  float* memory;
  int64_t group, dim, parts;

  Softmax of(int64_t pair, int64_t part) const {
    float* const q = memory + (pair * parts + part) * floats();
    float *const acc = q + group * dim, *const max = acc + group * dim;
    return {q, acc, max, max + group, static_cast<int>(group), dim};
  }
  int64_t floats() const { return group * (2 * dim + 2); }
};

void begin(const Problem& p, int64_t pair, const Softmax& state) {
  const float scale = kLog2E / std::sqrt(static_cast<float>(p.dim));
  for (int64_t i = 0; i < state.heads * p.dim; i++) {
    state.q[i] = scale * get(p.q, p.dtype, pair * state.heads * p.dim + i);
    state.acc[i] = 0.0f;
  }
  for (int g = 0; g < state.heads; g++) {
    state.max[g] = -INFINITY;
    state.sum[g] = 0.0f;
  }
}

// Layout: count(row), find(row, key head, first key, keys), and how far the n-th key head behind another one is.
template <typename Layout>
void run_task(const Problem& p, const Layout& layout, const States& states, int64_t pair, int64_t part,
              int64_t together) {
  const auto attend = kernels()->attend[p.cache];
  const int64_t row = pair / p.kv_heads, head = pair % p.kv_heads, of_key = p.dim * bytes_of(p.cache);
  for (int64_t n = 0; n < together; n++) begin(p, pair + n, states.of(pair + n, part));
  const int64_t count = layout.count(row), end = count * (part + 1) / states.parts;
  int64_t first = count * part / states.parts;
  Keys keys[2];
  find(layout, row, head, first, end, keys[0]);
  for (int turn = 0; keys[turn].count > 0; turn = !turn) {
    const Keys& now = keys[turn];
    Keys& next = keys[!turn];
    first += now.count;
    find(layout, row, head, first, end, next);
    Ahead k_ahead = {next.k, next.count, of_key, together * of_key};
    Ahead v_ahead = {next.v, next.count, of_key, together * of_key};
    for (int64_t n = 0; n < together; n++)
      attend(now, layout.offsets(n), states.of(pair + n, part), k_ahead, v_ahead);
  }
}

// One query head's parts into the first one, and out.
void merge(const Problem& p, const States& states, int64_t pair, int64_t g) {
  float* const merged = states.of(pair, 0).acc + g * p.dim;
  float top = -INFINITY, sum = 0.0f;
  for (int64_t part = 0; part < states.parts; part++) top = std::fmax(top, states.of(pair, part).max[g]);
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int64_t part = 0; part < states.parts; part++) {
    const Softmax other = states.of(pair, part);
    const float weight = std::exp2(other.max[g] - shift);
    sum += weight * other.sum[g];
    for (int64_t d = 0; d < p.dim; d++)
      merged[d] = weight * other.acc[g * p.dim + d] + (part ? merged[d] : 0.0f);
  }
  for (int64_t d = 0; d < p.dim; d++)
    set(p.out, p.dtype, (pair * states.group + g) * p.dim + d, sum == 0.0f ? 0.0f : merged[d] / sum);
}

template <typename Layout>
int attend_all(const Problem& p, const Layout& layout) {
  const int64_t group = p.heads / p.kv_heads, pairs = p.rows * p.kv_heads;
  const Cut how = cut(p, layout);
  States states = {nullptr, group, p.dim, how.parts};
  const Scratch scratch(most(pairs * how.parts * states.floats(), int64_t{1}) * static_cast<int64_t>(sizeof(float)));
  if (!scratch.memory) return kNoMemory;
  states.memory = reinterpret_cast<float*>(scratch.memory);
  const int64_t tasks = pairs * how.parts / how.together;

#pragma omp parallel num_threads(how.threads) if (how.threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++)
      run_task(p, layout, states, task / how.parts * how.together, task % how.parts, how.together);

#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * group; i++) merge(p, states, i / group, i % group);
  }
  return 0;
}

// A cache's keys or values, and how far apart they lie.
struct Side {
  const char* data;
  const int64_t* strides;  // in elements
};

struct Dense {
  static constexpr bool kHeadsSideBySide = false;
  Side k, v;  // [B, Hkv, C, D], strides of the first three
  const int32_t* lengths;
  const float* bias;  // [C], in powers of two; or null
  int bytes;

  int64_t count(int64_t row) const { return lengths[row]; }
  void find(int64_t row, int64_t head, int64_t first, Keys& keys) const {
    put(k, row, head, first, keys.k, keys.count);
    put(v, row, head, first, keys.v, keys.count);
    if (bias) keys.bias = bias + first;
  }
  void put(const Side& side, int64_t row, int64_t head, int64_t first, const void** to, int count) const {
    const char* const from = side.data + (row * side.strides[0] + head * side.strides[1]) * bytes;
    for (int i = 0; i < count; i++) to[i] = from + (first + i) * side.strides[2] * bytes;
  }
  Offsets offsets(int64_t n) const { return {n * k.strides[1] * bytes, n * v.strides[1] * bytes, 0}; }
};

struct Paged {
  static constexpr bool kHeadsSideBySide = true;
  Side k, v;  // [N, S, Hkv, D], strides of the first three
  const int32_t* lengths;
  const int32_t* table;  // [B, M]
  int64_t slots, blocks_of_row;
  int bytes;
  const float *k_scales, *v_scales;  // [N, S, Hkv]; or null
  int64_t kv_heads;

  int64_t count(int64_t row) const { return lengths[row]; }
  void find(int64_t row, int64_t head, int64_t first, Keys& keys) const {
    const int32_t* block = table + row * blocks_of_row + first / slots;
    int64_t slot = first % slots;
    for (int i = 0; i < keys.count; i++) {
      keys.k[i] = k.data + (*block * k.strides[0] + slot * k.strides[1] + head * k.strides[2]) * bytes;
      keys.v[i] = v.data + (*block * v.strides[0] + slot * v.strides[1] + head * v.strides[2]) * bytes;
      if (k_scales) {
        const int64_t scale = (*block * slots + slot) * kv_heads + head;
        keys.k_scales[i] = k_scales + scale, keys.v_scales[i] = v_scales + scale;
      }
      if (++slot == slots) slot = 0, block++;
    }
  }
  Offsets offsets(int64_t n) const {
    return {n * k.strides[2] * bytes, n * v.strides[2] * bytes, n * static_cast<int64_t>(sizeof(float))};
  }
};

struct Ranges {
  static constexpr bool kHeadsSideBySide = false;
  Side k, v;              // [Hkv, S, D], strides of the first two
  const int32_t* ranges;  // [B, 2]
  int bytes;

  int64_t count(int64_t row) const { return ranges[2 * row + 1] - ranges[2 * row]; }
  void find(int64_t row, int64_t head, int64_t first, Keys& keys) const {
    put(k, head, ranges[2 * row] + first, keys.k, keys.count);
    put(v, head, ranges[2 * row] + first, keys.v, keys.count);
  }
  void put(const Side& side, int64_t head, int64_t first, const void** to, int count) const {
    const char* const from = side.data + head * side.strides[0] * bytes;
    for (int i = 0; i < count; i++) to[i] = from + (first + i) * side.strides[1] * bytes;
  }
  Offsets offsets(int64_t n) const { return {n * k.strides[0] * bytes, n * v.strides[0] * bytes, 0}; }
};

}  // namespace

// Each returns 0, -1 where there is no memory, or 1 + the first row (token) whose lengths or indices are out of range.
extern "C" {

int llama_mm_cpu_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                  const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                  int64_t capacity, const int32_t* lengths, const float* key_bias, void* out,
                                  int threads) {
  for (int64_t row = 0; row < rows; row++)
    if (lengths[row] < 0 || lengths[row] > capacity) return static_cast<int>(row + 1);
  float* bias = nullptr;
  if (key_bias) {
    bias = static_cast<float*>(malloc(static_cast<size_t>(capacity + 1) * sizeof(float)));
    if (!bias) return kNoMemory;
    for (int64_t key = 0; key < capacity; key++) bias[key] = key_bias[key] * kLog2E;
  }
  const DType type = static_cast<DType>(dtype);
  const Problem problem = {q, out, type, rows, heads, kv_heads, dim, threads, type};
  const Dense keys = {{static_cast<const char*>(k), k_strides}, {static_cast<const char*>(v), v_strides}, lengths, bias,
                      bytes_of(type)};
  const int status = attend_all(problem, keys);
  free(bias);
  return status;
}

int llama_mm_cpu_paged_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads,
                                        int64_t dim, const void* k, const int64_t* k_strides, const void* v,
                                        const int64_t* v_strides, int cache_dtype, const float* k_scales,
                                        const float* v_scales, int64_t blocks, int64_t slots, const int32_t* table,
                                        int64_t blocks_of_row, const int32_t* lengths, void* out, int threads) {
  for (int64_t row = 0; row < rows; row++) {
    if (lengths[row] < 0 || lengths[row] > blocks_of_row * slots) return static_cast<int>(row + 1);
    for (int64_t i = 0; i * slots < lengths[row]; i++) {
      const int32_t block = table[row * blocks_of_row + i];
      if (block < 0 || block >= blocks) return static_cast<int>(row + 1);
    }
  }
  const DType cache = static_cast<DType>(cache_dtype);
  const Problem problem = {q, out, static_cast<DType>(dtype), rows, heads, kv_heads, dim, threads, cache};
  const Paged keys = {{static_cast<const char*>(k), k_strides}, {static_cast<const char*>(v), v_strides}, lengths, table,
                      slots, blocks_of_row, bytes_of(cache), k_scales, v_scales, kv_heads};
  return attend_all(problem, keys);
}

int llama_mm_cpu_cross_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                 const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                 int64_t tokens, const int32_t* ranges, void* out, int threads) {
  for (int64_t row = 0; row < rows; row++)
    if (ranges[2 * row] < 0 || ranges[2 * row + 1] < ranges[2 * row] || ranges[2 * row + 1] > tokens)
      return static_cast<int>(row + 1);
  const DType type = static_cast<DType>(dtype);
  const Problem problem = {q, out, type, rows, heads, kv_heads, dim, threads, type};
  const Ranges keys = {{static_cast<const char*>(k), k_strides}, {static_cast<const char*>(v), v_strides}, ranges,
                       bytes_of(type)};
  return attend_all(problem, keys);
}

}  // extern "C"
