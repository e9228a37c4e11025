// A linear layer of many rows with a bf16 weight, in fp32 products: for CPUs that multiply bf16 slower, or not at all.
//
// The weights of some outputs are widened and interleaved, then all rows of x go over them. A task is a few rows: they
// are widened, small enough for the second cache, and meet one group of outputs after the other there.
//
// Shapes: T rows of x · K inputs · N outputs · O outputs that are computed together
#include "linear.h"

#include <omp.h>

#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kInputs = 192;                  // at a time, whose weights of O outputs fit the first cache: 48 KB
constexpr int64_t kMostValues = int64_t{1} << 19;  // of a weight that are in order at a time: 2 MB, which stay in the caches
constexpr int64_t kRowsOfTask = 96;               // at most; a multiple of kRowsTogether
constexpr int64_t kTasksOfThread = 4;             // at least, where there are rows for so many

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

extern "C" {

// Whether there are such products with the instruction set in use.
int llama_mm_cpu_has_wide_linear() { return wide_product() != nullptr; }

// x: bf16 [T, K]; weight: bf16 [N, K]; bias: [N] or null; out: bf16 [T, N]. 0, or 1 where there is no memory.
int llama_mm_cpu_wide_linear(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const void* bias,
                             int bias_dtype, int64_t outputs, uint16_t* out, int threads) {
  const WideProduct& use = *wide_product();
  const int64_t per_task = least(kRowsOfTask, rounded_up(most(1, rows / (threads * kTasksOfThread)), kRowsTogether));
  const int64_t tasks = (rows + per_task - 1) / per_task;
  const int64_t of_group = use.outputs * inputs, groups = (outputs + use.outputs - 1) / use.outputs;
  const int64_t together = least(groups, most(1, kMostValues / most(1, of_group)));  // groups in order at a time
  const int64_t of_thread = per_task * (inputs + use.outputs);  // rows and sums
  const Scratch ordered_memory(together * of_group * 4), thread_memory(threads * of_thread * 4);
  const Scratch bias_memory(groups * use.outputs * 4);
  if (!ordered_memory.memory || !thread_memory.memory || !bias_memory.memory) return 1;
  float* const ordered = reinterpret_cast<float*>(ordered_memory.memory);
  float* const added = reinterpret_cast<float*>(bias_memory.memory);
  for (int64_t n = 0; n < groups * use.outputs; n++)
    added[n] = bias && n < outputs ? get(bias, static_cast<DType>(bias_dtype), n) : 0.0f;

#pragma omp parallel num_threads(threads)
  {
    float* const wide = reinterpret_cast<float*>(thread_memory.memory) + omp_get_thread_num() * of_thread;
    float* const sums = wide + per_task * inputs;
    for (int64_t group = 0; group < groups; group += together) {
      const int64_t end = least(groups, group + together);
#pragma omp for schedule(static)
      for (int64_t g = group; g < end; g++) {
        const int64_t first = g * use.outputs, there = least(outputs - first, use.outputs);
        use.order_weights(weight + first * inputs, inputs, there, inputs, ordered + (g - group) * of_group);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task * per_task, count = least(rows - row, per_task);
        use.widen(x + row * inputs, count * inputs, wide);
        for (int64_t i = count * inputs; i < rounded_up(count, kRowsTogether) * inputs; i++) wide[i] = 0.0f;
        for (int64_t g = group; g < end; g++) {
          const int64_t first = g * use.outputs, there = least(outputs - first, use.outputs);
          for (int64_t k = 0; k < inputs; k += kInputs) {
            const int64_t some = least(inputs - k, kInputs);
            const float* const weights = ordered + (g - group) * of_group + k * use.outputs;
            for (int64_t t = 0; t < count; t += kRowsTogether)
              use.multiply(wide + t * inputs + k, inputs, weights, some, k > 0, sums + t * use.outputs);
          }
          for (int64_t t = 0; t < count; t++)
            use.finish(sums + t * use.outputs, added + first, there, out + (row + t) * outputs + first);
        }
      }
    }
  }
  return 0;
}

}  // extern "C"
