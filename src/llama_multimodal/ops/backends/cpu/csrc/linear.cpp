// A linear layer of many rows with a bf16 weight, in fp32 products: for CPUs that multiply bf16 slower, or not at all.
//
// A task is some outputs: their weights are widened and interleaved a few inputs at a time, small enough for the second
// cache, and all rows of x go over them there.
//
// Shapes: T rows of x · K inputs · N outputs · O outputs of a task
#include "linear.h"

#include <omp.h>

#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kInputs = 512;     // whose weights lie in the second cache: at most 128 KB
constexpr int64_t kRowsAtOnce = 1020;  // rows of x that are widened together; a multiple of kRowsTogether

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

extern "C" {

// Whether there are such products with the instruction set in use.
int llama_mm_cpu_has_wide_linear() { return wide_product() != nullptr; }

// x: bf16 [T, K]; weight: bf16 [N, K]; bias: [N] or null; out: bf16 [T, N]. 0, or 1 where there is no memory.
int llama_mm_cpu_wide_linear(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const void* bias,
                             int bias_dtype, int64_t outputs, uint16_t* out, int threads) {
  const WideProduct& use = *wide_product();
  const int64_t most = least(rows, kRowsAtOnce), padded = (most + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  const int64_t tasks = (outputs + use.outputs - 1) / use.outputs;
  const int64_t of_thread = use.outputs * (least(inputs, kInputs) + padded);  // ordered weights and sums
  const Scratch wide_memory(padded * inputs * 4), thread_memory(threads * of_thread * 4);
  if (!wide_memory.memory || !thread_memory.memory) return 1;
  float* const wide = reinterpret_cast<float*>(wide_memory.memory);

#pragma omp parallel num_threads(threads)
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const int64_t count = least(rows - row, kRowsAtOnce);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < padded; t++)
      for (int64_t k = 0; k < inputs; k++)
        wide[t * inputs + k] = t < count ? get(x, kBFloat16, (row + t) * inputs + k) : 0.0f;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      float* const ordered = reinterpret_cast<float*>(thread_memory.memory) + omp_get_thread_num() * of_thread;
      float* const sums = ordered + use.outputs * least(inputs, kInputs);
      const int64_t first = task * use.outputs, there = least(outputs - first, use.outputs);
      for (int64_t k = 0; k < inputs; k += kInputs) {
        const int64_t some = least(inputs - k, kInputs);
        use.order_weights(weight + first * inputs + k, inputs, there, some, ordered);
        for (int64_t t = 0; t < count; t += kRowsTogether)
          use.multiply(wide + t * inputs + k, inputs, ordered, some, k > 0, sums + t * use.outputs);
      }
      for (int64_t t = 0; t < count; t++) {
        float* const sum = sums + t * use.outputs;
        if (bias)
          for (int64_t n = 0; n < there; n++) sum[n] += get(bias, static_cast<DType>(bias_dtype), first + n);
        put_row(out, kBFloat16, (row + t) * outputs + first, sum, there);
      }
    }
  }
  return 0;
}

}  // extern "C"
