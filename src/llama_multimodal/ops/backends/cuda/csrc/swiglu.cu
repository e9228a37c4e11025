// swiglu: silu(gate) · up, forward and backward.
//
// Shapes: R rows · F columns · V elements of a vector
//
// gate and up are [R, F] with a step between rows, so that both may be halves of one packed tensor. What is contiguous
// comes as a single row. A block takes a piece of one row, a thread HELD vectors of it.
#include "common.cuh"

#include <algorithm>

namespace {

constexpr int HELD = 2;  // loads of 16 bytes under way, of each input

// Where a block's piece lies: the row, and the place of this thread's first vector in it.
template <int V>
struct Piece {
    int64_t row, column, step;
    __device__ __forceinline__ explicit Piece(unsigned pieces) {
        row = blockIdx.x / pieces;
        step = blockDim.x * V;
        column = int64_t(blockIdx.x % pieces) * HELD * step + threadIdx.x * V;
    }
};

template <typename T, int V>
__global__ void __launch_bounds__(256)
    forward(const T* gates, const T* ups, T* outs, int64_t gate_step, int64_t up_step, int64_t columns,
            unsigned pieces) {
    Piece<V> piece(pieces);
    const T *gate = gates + piece.row * gate_step, *up = ups + piece.row * up_step;
    T* out = outs + piece.row * columns;
    Vector<T, V> g[HELD], u[HELD];
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int64_t i = piece.column + n * piece.step;
        if (i >= columns) break;
        g[n] = load<T, V>(gate + i);
        u[n] = load<T, V>(up + i);
    }
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int64_t i = piece.column + n * piece.step;
        if (i >= columns) return;
        for (int j = 0; j < V; ++j) {
            const float x = to_float(g[n].at[j]);
            g[n].at[j] = from_float<T>(rounded<T>(x * sigmoid<T>(x)) * to_float(u[n].at[j]));
        }
        store(out + i, g[n]);
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(256)
    backward(const T* grads, const T* gates, const T* ups, T* grad_gates, T* grad_ups, int64_t grad_step,
             int64_t gate_step, int64_t up_step, int64_t out_step, int64_t columns, unsigned pieces) {
    Piece<V> piece(pieces);
    const T *grad = grads + piece.row * grad_step, *gate = gates + piece.row * gate_step;
    const T* up = ups + piece.row * up_step;
    T *grad_gate = grad_gates + piece.row * out_step, *grad_up = grad_ups + piece.row * out_step;
    Vector<T, V> d[HELD], g[HELD], u[HELD];
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int64_t i = piece.column + n * piece.step;
        if (i >= columns) break;
        d[n] = load<T, V>(grad + i);
        g[n] = load<T, V>(gate + i);
        u[n] = load<T, V>(up + i);
    }
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int64_t i = piece.column + n * piece.step;
        if (i >= columns) return;
        for (int j = 0; j < V; ++j) {
            const float x = to_float(g[n].at[j]), s = sigmoid<T>(x), to_out = to_float(d[n].at[j]);
            const float to_silu = rounded<T>(to_out * to_float(u[n].at[j]));
            u[n].at[j] = from_float<T>(to_out * rounded<T>(x * s));
            g[n].at[j] = from_float<T>(to_silu * s * (1 + x * (1 - s)));
        }
        store(grad_gate + i, g[n]);
        store(grad_up + i, u[n]);
    }
}

// Calls f(grid, block, pieces of a row) for vectors of V.
template <int V, typename F>
int with_pieces(int64_t rows, int64_t columns, F f) {
    const int64_t threads = std::min<int64_t>(256, ceil_div(ceil_div(columns, V * HELD), 32) * 32);
    const int64_t pieces = ceil_div(columns, threads * V * HELD);
    if (rows * pieces > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
    return f(dim3(rows * pieces), dim3(threads), pieces);
}
}  // namespace

// gate, up: [R, F] with a step between rows → out, contiguous.
extern "C" int llama_mm_swiglu(const void* gate, const void* up, void* out, int64_t rows, int64_t columns,
                               int64_t gate_step, int64_t up_step, int dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = VECTOR_BYTES / sizeof(T);
        auto start = [&](auto kernel, dim3 grid, dim3 block, int64_t pieces) {
            return launch(kernel, grid, block, 0, stream, gate, up, out, gate_step, up_step, columns, pieces);
        };
        // With several rows, each must begin at a vector; out's step is the number of columns.
        if (aligned<V>(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), gate_step, up_step,
                       columns))
            return with_pieces<V>(rows, columns, [&](auto... at) { return start(forward<T, V>, at...); });
        return with_pieces<1>(rows, columns, [&](auto... at) { return start(forward<T, 1>, at...); });
    });
}

// The gradients of gate and up, both [R, F] with out_step between rows.
extern "C" int llama_mm_swiglu_backward(const void* grad, const void* gate, const void* up, void* grad_gate,
                                        void* grad_up, int64_t rows, int64_t columns, int64_t grad_step,
                                        int64_t gate_step, int64_t up_step, int64_t out_step, int dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = VECTOR_BYTES / sizeof(T);
        auto start = [&](auto kernel, dim3 grid, dim3 block, int64_t pieces) {
            return launch(kernel, grid, block, 0, stream, grad, gate, up, grad_gate, grad_up, grad_step, gate_step,
                          up_step, out_step, columns, pieces);
        };
        if (aligned<V>(static_cast<const T*>(grad), static_cast<const T*>(gate), static_cast<const T*>(up),
                       static_cast<T*>(grad_gate), static_cast<T*>(grad_up), grad_step, gate_step, up_step, out_step,
                       columns))
            return with_pieces<V>(rows, columns, [&](auto... at) { return start(backward<T, V>, at...); });
        return with_pieces<1>(rows, columns, [&](auto... at) { return start(backward<T, 1>, at...); });
    });
}
