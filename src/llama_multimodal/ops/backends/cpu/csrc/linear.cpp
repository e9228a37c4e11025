// A linear layer of many rows with a bf16 weight, in fp32 products: for CPUs that multiply bf16 slower, or not at all.
//
// A weight's outputs go in groups. Few rows of x are widened once, and each thread brings a group's weights into order
// and multiplies all rows by them, a few inputs at a time: what it needs stays in its caches. With many rows the x of
// all would not: there the weights of several groups are brought into order first, then each thread takes some rows,
// widens them and multiplies them by one group after the other.
//
// Shapes: T rows of x · K inputs · N outputs · O outputs of a group
#include "linear.h"

#include <omp.h>

#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kFewRows = 768;
constexpr int64_t kInputs = 192;                   // at a time, whose weights of a group fit the first cache: 48 KB
constexpr int64_t kMostValues = int64_t{1} << 19;  // of a weight that are in order at a time: 2 MB
constexpr int64_t kRowsOfTask = 96;                // a multiple of kRowsTogether

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
  int64_t there(int64_t group) const { return least(outputs - group * use.outputs, use.outputs); }

  // `some` inputs of a group from the k-th on → fp32 [some, O].
  void order(int64_t group, int64_t k, int64_t some, float* to) const {
    use.order_weights(weight + group * use.outputs * inputs + k, inputs, there(group), some, to);
  }

  // Rows [row, row + count) → fp32 [count, K]; zeros up to a multiple of kRowsTogether.
  void widen(int64_t row, int64_t count, float* to) const {
    use.widen(x + row * inputs, count * inputs, to);
    for (int64_t i = count * inputs; i < rounded_up(count, kRowsTogether) * inputs; i++) to[i] = 0.0f;
  }

  // sums [count, O] of widened rows and `some` inputs from the k-th on, whose weights are in order.
  void multiply(const float* wide, int64_t count, int64_t k, int64_t some, const float* ordered, float* sums) const {
    for (int64_t t = 0; t < count; t += kRowsTogether)
      use.multiply(wide + t * inputs + k, inputs, ordered, some, k > 0, sums + t * use.outputs);
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
      p.widen(row, least(p.rows - row, kRowsTogether), wide + row * p.inputs);
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < p.groups(); group++) {
      for (int64_t k = 0; k < p.inputs; k += kInputs) {
        const int64_t some = least(p.inputs - k, kInputs);
        p.order(group, k, some, ordered);
        p.multiply(wide, p.rows, k, some, ordered, sums);
      }
      p.finish(0, p.rows, group, sums);
    }
  }
  return 0;
}

int many_rows(const Problem& p) {
  const int64_t tasks = (p.rows + kRowsOfTask - 1) / kRowsOfTask, of_thread = kRowsOfTask * (p.inputs + p.use.outputs);
  const int64_t of_group = p.use.outputs * p.inputs;
  const int64_t together = least(p.groups(), most(1, kMostValues / most(1, of_group)));  // in order at a time
  const Scratch ordered_memory(together * of_group * 4), thread_memory(p.threads * of_thread * 4);
  if (!ordered_memory.memory || !thread_memory.memory) return 1;
  float* const ordered = reinterpret_cast<float*>(ordered_memory.memory);
#pragma omp parallel num_threads(p.threads)
  {
    float* const wide = reinterpret_cast<float*>(thread_memory.memory) + omp_get_thread_num() * of_thread;
    float* const sums = wide + kRowsOfTask * p.inputs;
    for (int64_t first = 0; first < p.groups(); first += together) {
      const int64_t end = least(p.groups(), first + together);
#pragma omp for schedule(static)
      for (int64_t group = first; group < end; group++)
        p.order(group, 0, p.inputs, ordered + (group - first) * of_group);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task * kRowsOfTask, count = least(p.rows - row, kRowsOfTask);
        p.widen(row, count, wide);
        for (int64_t group = first; group < end; group++) {
          const float* const weights = ordered + (group - first) * of_group;
          for (int64_t k = 0; k < p.inputs; k += kInputs)
            p.multiply(wide, count, k, least(p.inputs - k, kInputs), weights + k * p.use.outputs, sums);
          p.finish(row, count, group, sums);
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

// x: bf16 [T, K]; weight: bf16 [N, K]; bias: [N] or null; out: bf16 [T, N]. 0, or 1 where there is no memory.
int llama_mm_cpu_wide_linear(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const void* bias,
                             int bias_dtype, int64_t outputs, uint16_t* out, int threads) {
  const WideProduct& use = *wide_product();
  const int64_t padded = rounded_up(outputs, use.outputs);
  const Scratch bias_memory(padded * 4);
  if (!bias_memory.memory) return 1;
  float* const added = reinterpret_cast<float*>(bias_memory.memory);
  for (int64_t n = 0; n < padded; n++)
    added[n] = bias && n < outputs ? get(bias, static_cast<DType>(bias_dtype), n) : 0.0f;
  const Problem p = {use, x, rows, inputs, weight, added, outputs, out, threads};
  return rows <= kFewRows ? few_rows(p) : many_rows(p);
}

}  // extern "C"
