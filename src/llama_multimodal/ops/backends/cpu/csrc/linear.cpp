// A linear layer of many rows with a bf16 weight, in fp32 products: for CPUs that multiply bf16 slower, or not at all.
//
// A weight's outputs go in groups. Few rows of x are widened once, and each thread brings a group's weights into order
// and multiplies all rows by them, a few inputs at a time: what it needs stays in its caches. With many rows the x of
// all would not: there the weights of several groups are brought into order first, then each thread takes some rows,
// widens them and multiplies them by one group after the other. Of long rows it takes a part of the inputs at a time.
//
// Shapes: T rows of x · K inputs · N outputs · O outputs of a group
#include "linear.h"

#include <omp.h>
#include <unistd.h>

#include "bias.h"
#include "drivers.h"
#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kFewRows = 768;
constexpr int64_t kFewValues = int64_t{3} << 19;  // of x in fp32, which each group reads as a whole: 6 MB
constexpr int64_t kInputs = 192;                   // at a time, whose weights of a group fit the first cache: 48 KB
constexpr int64_t kMostValues = int64_t{1} << 19;  // of a weight that are in order at a time: 2 MB
constexpr int64_t kRowsOfTask = 96;                // a multiple of kRowsTogether
constexpr int64_t kMostWidened = 7 * kInputs;      // of a task's rows: 0.5 MB
constexpr int64_t kMostSums = int64_t{1} << 22;    // that wait for the next part of the inputs: 16 MB
constexpr int64_t kRowsAtOnce = 64 * kRowsOfTask;  // whose sums wait for the next part of the inputs

// Inputs of a task's rows that half of the second cache holds.
int64_t widened_inputs() {
  int64_t cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  cache = bytes;
#endif
  if (cache <= 0) cache = 1 << 19;  // unknown
  return least(kMostWidened, kInputs * most(int64_t{1}, cache / 2 / (kRowsOfTask * kInputs * 4)));
}

struct Problem {
  const WideProduct& use;
  const uint16_t* x;
  int64_t rows, inputs;
  const uint16_t* weight;
  const float* bias;  // [N], padded to whole groups
  int64_t outputs;
  uint16_t* out;
  int threads;

  int64_t groups() const { return (outputs + use.outputs - 1) / use.outputs; }
  int64_t there(int64_t group) const { return least(outputs - group * use.outputs, int64_t{use.outputs}); }

  // `some` inputs of a group from the k-th on → fp32 [some, O].
  void order(int64_t group, int64_t k, int64_t some, float* to) const {
    use.order_weights(weight + group * use.outputs * inputs + k, inputs, there(group), some, to);
  }

  // `some` inputs from the k-th on of rows [row, row + count) → fp32 [count, some]; zeros up to a multiple of
  // kRowsTogether.
  void widen(int64_t row, int64_t count, int64_t k, int64_t some, float* to) const {
    for (int64_t t = 0; t < count; t++) use.widen(x + (row + t) * inputs + k, some, to + t * some);
    for (int64_t i = count * some; i < rounded_up(count, kRowsTogether) * some; i++) to[i] = 0.0f;
  }

  // sums [count, O] of widened rows [count, stride] and as many inputs as have their weights in order.
  void multiply(const float* wide, int64_t stride, int64_t count, const float* ordered, int64_t some, bool add,
                float* sums) const {
    for (int64_t t = 0; t < count; t += kRowsTogether)
      use.multiply(wide + t * stride, stride, ordered, some, add, sums + t * use.outputs);
  }

  void finish(int64_t row, int64_t count, int64_t group, const float* sums) const {
    const int64_t first = group * use.outputs;
    for (int64_t t = 0; t < count; t++)
      use.finish(sums + t * use.outputs, bias + first, there(group), out + (row + t) * outputs + first);
  }
};

int few_rows(const Problem& p) {
  const int64_t padded = rounded_up(p.rows, kRowsTogether), of_thread = p.use.outputs * (kInputs + padded);
  const Scratch wide_memory(padded * p.inputs * 4), thread_memory(p.threads * of_thread * 4);
  if (!wide_memory.memory || !thread_memory.memory) return 1;
  float* const wide = reinterpret_cast<float*>(wide_memory.memory);
#pragma omp parallel num_threads(p.threads)
  {
    float* const ordered = reinterpret_cast<float*>(thread_memory.memory) + omp_get_thread_num() * of_thread;
    float* const sums = ordered + p.use.outputs * kInputs;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; row += kRowsTogether)
      for (int64_t k = 0; k < p.inputs; k += kInputs) {  // [K/kInputs, padded, kInputs]: what is read together
        const int64_t some = least(p.inputs - k, kInputs);
        p.widen(row, least(p.rows - row, int64_t{kRowsTogether}), k, some, wide + k * padded + row * some);
      }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < p.groups(); group++) {
      for (int64_t k = 0; k < p.inputs; k += kInputs) {
        const int64_t some = least(p.inputs - k, kInputs);
        p.order(group, k, some, ordered);
        p.multiply(wide + k * padded, some, p.rows, ordered, some, k > 0, sums);
      }
      p.finish(0, p.rows, group, sums);
    }
  }
  return 0;
}

// Rows [from, to).
int many_rows(const Problem& p, int64_t from, int64_t to) {
  const int64_t tasks = (to - from + kRowsOfTask - 1) / kRowsOfTask, widened = widened_inputs();
  const int64_t parts = (p.inputs + widened - 1) / widened;
  const int64_t of_part = rounded_up((p.inputs + parts - 1) / parts, 16), of_group = p.use.outputs * of_part;
  const int64_t of_sums = kRowsOfTask * p.use.outputs, sums_wait = parts > 1 ? tasks * of_sums : 1;
  const int64_t fit = least(kMostValues / of_group, kMostSums / sums_wait);
  const int64_t together = least(p.groups(), most(int64_t{1}, fit));  // in order at a time
  const Scratch ordered_memory(together * of_group * 4), wide_memory(p.threads * kRowsOfTask * of_part * 4);
  const Scratch sums_memory((parts > 1 ? tasks * together : p.threads) * of_sums * 4);
  if (!ordered_memory.memory || !wide_memory.memory || !sums_memory.memory) return 1;
  float* const ordered = reinterpret_cast<float*>(ordered_memory.memory);
  float* const all_sums = reinterpret_cast<float*>(sums_memory.memory);
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num();
    float* const wide = reinterpret_cast<float*>(wide_memory.memory) + thread * kRowsOfTask * of_part;
    for (int64_t first = 0; first < p.groups(); first += together) {
      const int64_t end = least(p.groups(), first + together);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t start = part * of_part, inputs = least(p.inputs - start, of_part);
#pragma omp for schedule(static)
        for (int64_t group = first; group < end; group++)
          p.order(group, start, inputs, ordered + (group - first) * of_group);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
          const int64_t row = from + task * kRowsOfTask, count = least(to - row, kRowsOfTask);
          p.widen(row, count, start, inputs, wide);
          for (int64_t group = first; group < end; group++) {
            const float* const weights = ordered + (group - first) * of_group;
            float* const sums = all_sums + (parts > 1 ? task * together + group - first : thread) * of_sums;
            for (int64_t k = 0; k < inputs; k += kInputs)
              p.multiply(wide + k, inputs, count, weights + k * p.use.outputs, least(inputs - k, kInputs),
                         start + k > 0, sums);
            if (part == parts - 1) p.finish(row, count, group, sums);
          }
        }
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" {

// Whether there are such products with the instruction set in use.
int llama_mm_cpu_has_wide_linear() { return wide_product() != nullptr; }

// x: bf16 [T, K], K >= 1; weight: bf16 [N, K]; bias: [N] or null; out: bf16 [T, N]. 0, or 1 where there is no memory.
int llama_mm_cpu_wide_linear(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const void* bias,
                             int bias_dtype, int64_t outputs, uint16_t* out, int threads) {
  if (const TileLinear* tiles = tile_linear(kBFloat16, inputs)) {
    const Bias added(bias, bias_dtype, outputs, rounded_up(outputs, 32));
    const int64_t bytes = outputs * inputs * 2 * (1 + rows / 32);  // or as much work
    return !added.values || tiles->plain(x, rows, inputs, weight, added.values, outputs, out,
                                         useful_threads(threads, bytes));
  }
  const WideProduct& use = *wide_product();
  const Bias added(bias, bias_dtype, outputs, rounded_up(outputs, use.outputs));
  if (!added.values) return 1;
  const Problem p = {use, x, rows, inputs, weight, added.values, outputs, out, threads};
  // Tasks are of so many rows that every thread gets one only where there are enough of them.
  if (rows <= kFewRows && (rows < kRowsOfTask * threads || rows * inputs <= kFewValues)) return few_rows(p);
  for (int64_t from = 0; from < rows; from += kRowsAtOnce)
    if (many_rows(p, from, least(rows, from + kRowsAtOnce))) return 1;
  return 0;
}

}  // extern "C"
