// linear_gelu: what follows the product, in place: gelu(product + bias).
//
// Shapes: R rows · N columns, one bias for each · V elements of a vector
#include "common.cuh"

#include <algorithm>

namespace {

constexpr int HELD = 2;  // loads of 16 bytes under way

template <typename T, bool TANH>
__device__ __forceinline__ float gelu(float x) {
    if (!TANH) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));  // √½
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), which does not cancel for negative u.
    return x * sigmoid<T>(1.59576912160573071f * (x + 0.044715f * x * x * x));  // 2 · √(2/π)
}

// A thread keeps its columns, and their bias, for all rows that its block takes.
template <typename T, int V, bool TANH>
__global__ void __launch_bounds__(256) bias_gelu(T* product, const T* bias, int64_t rows, int64_t columns) {
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    Vector<T, V> added = {}, value[HELD];
    if (bias) added = load<T, V>(bias + column);
    const int64_t step = int64_t(gridDim.y) * blockDim.y;
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += HELD * step) {
#pragma unroll
        for (int n = 0; n < HELD; ++n)
            if (row + n * step < rows) value[n] = load<T, V>(product + (row + n * step) * columns + column);
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            if (row + n * step >= rows) break;
            for (int j = 0; j < V; ++j) {
                const float x = to_float(value[n].at[j]);
                // The reference's product comes with the bias and is stored before the GELU.
                const float sum = bias ? rounded<T>(x + to_float(added.at[j])) : x;
                value[n].at[j] = from_float<T>(gelu<T, TANH>(sum));
            }
            store(product + (row + n * step) * columns + column, value[n]);
        }
    }
}

template <typename T, int V>
int start(T* product, const T* bias, int64_t rows, int64_t columns, bool tanh, void* stream) {
    const int64_t vectors = ceil_div(columns, V);
    const unsigned across = unsigned(std::min<int64_t>(256, ceil_div(vectors, 32) * 32));
    const unsigned down = 256 / across;
    // No more blocks down than rows for HELD each, and no more than CUDA allows.
    const int64_t blocks_down = std::min<int64_t>(65535, ceil_div(rows, int64_t(down) * HELD));
    return launch(tanh ? bias_gelu<T, V, true> : bias_gelu<T, V, false>, dim3(ceil_div(vectors, across), blocks_down),
                  dim3(across, down), 0, stream, product, bias, rows, columns);
}
}  // namespace

// product: [R, N] contiguous, overwritten; bias: [N] or null; tanh: the approximation instead of the exact GELU.
extern "C" int llama_mm_bias_gelu(void* product, const void* bias, int64_t rows, int64_t columns, int tanh, int dtype,
                                  void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = VECTOR_BYTES / sizeof(T);
        auto* to = static_cast<T*>(product);
        auto* added = static_cast<const T*>(bias);
        if (aligned<V>(to, added, columns)) return start<T, V>(to, added, rows, columns, tanh, stream);
        return start<T, 1>(to, added, rows, columns, tanh, stream);
    });
}
