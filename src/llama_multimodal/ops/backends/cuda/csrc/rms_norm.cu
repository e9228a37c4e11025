// rms_norm and add_rms_norm, forward and backward.
//
// Shapes: R rows · D size of a row · V elements of a vector · P blocks of the backward
//
// blockDim.x threads work on a row, blockDim.y rows are in a block; more than one only where a part of a warp is enough
// for a row. A thread holds HELD vectors of its row in registers, so that memory is read once; rows too long for that,
// or not aligned, have HELD = 0 and are read twice, the second time from a cache.
#include "common.cuh"

#include <algorithm>

namespace {

// Where row r of a tensor [n0, n1, n2, D] starts, for any steps between rows.
struct Rows {
    int64_t n1, n2, step0, step1, step2;
    __device__ __forceinline__ int64_t operator()(int64_t row) const {
        if (n1 == 1 && n2 == 1) return row * step0;
        int64_t outer = row / n2;
        return outer / n1 * step0 + outer % n1 * step1 + row % n2 * step2;
    }
};

// The sum over the threads of a row, for two values at once. Every thread of the block comes here.
__device__ __forceinline__ float2 sum_row(float2 x) {
    __shared__ float2 parts[32];
    int width = blockDim.x < 32 ? blockDim.x : 32;
    x = {sum_lanes(x.x, width), sum_lanes(x.y, width)};
    if (blockDim.x <= 32) return x;
    __syncthreads();  // the parts of the row before have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : float2{0, 0};
    return {sum_lanes(x.x), sum_lanes(x.y)};
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> add(Vector<T, V> a, const Vector<T, V>& b) {
    for (int j = 0; j < V; ++j) a.at[j] = from_float<T>(to_float(a.at[j]) + to_float(b.at[j]));
    return a;
}

// What a thread does for each of its vectors: f(place in the row, number of the vector).
template <int V, int HELD, typename F>
__device__ __forceinline__ void each_vector(int64_t size, F f) {
    const int64_t first = threadIdx.x * V, step = blockDim.x * V;
    if (HELD) {
#pragma unroll
        for (int n = 0; n < HELD; ++n)
            if (first + n * step < size) f(first + n * step, n);
    } else {
        for (int64_t i = first; i < size; i += step) f(i, 0);
    }
}

// out = round((residual + x) / rms) · weight, and the rounded sum goes to `summed`; without a residual both are null.
template <typename T, int V, int HELD>
__global__ void __launch_bounds__(1024, 1)
    forward(const T* x, Rows x_rows, const T* residual, Rows residual_rows, const T* weight, T* out, T* summed,
            int64_t rows, int64_t size, float eps) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool inside = row < rows;  // the others come along to the sums
    if (inside) {
        x += x_rows(row);
        out += row * size;
        if (residual) residual += residual_rows(row), summed += row * size;
    }
    auto read = [&](int64_t i) {
        auto value = load<T, V>(x + i);
        if (residual) {
            auto other = load<T, V>(residual + i);
            for (int j = 0; j < V; ++j) value.at[j] = from_float<T>(to_float(other.at[j]) + to_float(value.at[j]));
        }
        return value;
    };

    Vector<T, V> held[HELD ? HELD : 1];
    float squares = 0;
    if (inside) {
        if (HELD) each_vector<V, HELD>(size, [&](int64_t i, int n) { held[n] = read(i); });
        each_vector<V, HELD>(size, [&](int64_t i, int n) {
            if (!HELD) held[0] = read(i);
            for (int j = 0; j < V; ++j) squares += to_float(held[n].at[j]) * to_float(held[n].at[j]);
        });
    }
    const float scale = rsqrtf(sum_row({squares, 0}).x / float(size) + eps);
    if (!inside) return;
    each_vector<V, HELD>(size, [&](int64_t i, int n) {
        if (!HELD) held[0] = read(i);
        auto w = load<T, V>(weight + i);
        Vector<T, V> y;
        for (int j = 0; j < V; ++j)
            y.at[j] = from_float<T>(rounded<T>(to_float(held[n].at[j]) * scale) * to_float(w.at[j]));
        store(out + i, y);
        if (summed) store(summed + i, held[n]);
    });
}

// With r = 1 / rms of the row: grad_x = r · g · weight - x · r³ · mean(g · weight · x), and grad_sum on top where there
// is one. Each block adds up g · round(x · r) over its rows, for the weight: parts [P, D].
template <typename T, int V, int HELD>
__global__ void __launch_bounds__(512, 1)
    backward(const T* grads, Rows grad_rows, const T* grad_sums, Rows grad_sum_rows, const T* xs, Rows x_rows,
             const T* weight, T* grad_xs, float* parts, int64_t rows, int64_t size, float eps) {
    float* part = parts + blockIdx.x * size;
    float own[HELD ? HELD * V : 1] = {};
    Vector<T, V> held_x[HELD ? HELD : 1], held_grad[HELD ? HELD : 1];
    const int64_t row_step = int64_t(gridDim.x) * blockDim.y;
    for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < rows; base += row_step) {
        const int64_t row = base + threadIdx.y;
        const bool inside = row < rows;
        const T *x = xs, *grad = grads, *grad_sum = nullptr;
        if (inside) {
            x += x_rows(row);
            grad += grad_rows(row);
            if (grad_sums) grad_sum = grad_sums + grad_sum_rows(row);
        }
        T* grad_x = grad_xs + row * size;

        auto read = [&](int64_t i, int n) {
            held_x[n] = load<T, V>(x + i);
            held_grad[n] = load<T, V>(grad + i);
        };
        float2 sums = {0, 0};  // of x² and of g · weight · x
        if (inside) {
            if (HELD) each_vector<V, HELD>(size, read);
            each_vector<V, HELD>(size, [&](int64_t i, int n) {
                if (!HELD) read(i, 0);
                auto w = load<T, V>(weight + i);
                for (int j = 0; j < V; ++j) {
                    float value = to_float(held_x[n].at[j]);
                    sums.x += value * value;
                    sums.y += to_float(held_grad[n].at[j]) * to_float(w.at[j]) * value;
                }
            });
        }
        sums = sum_row(sums);
        const float scale = rsqrtf(sums.x / float(size) + eps);
        const float pull = scale * scale * scale * sums.y / float(size);
        if (!inside) continue;
        each_vector<V, HELD>(size, [&](int64_t i, int n) {
            if (!HELD) read(i, 0);
            auto w = load<T, V>(weight + i);
            Vector<T, V> add, out;
            if (grad_sum) add = load<T, V>(grad_sum + i);
            for (int j = 0; j < V; ++j) {
                float value = to_float(held_x[n].at[j]), g = to_float(held_grad[n].at[j]);
                float to_x = scale * g * to_float(w.at[j]) - value * pull;
                out.at[j] = from_float<T>(grad_sum ? to_x + to_float(add.at[j]) : to_x);
                float to_weight = g * rounded<T>(value * scale);
                if (HELD) own[n * V + j] += to_weight;
                else part[i + j] = base == int64_t(blockIdx.x) ? to_weight : part[i + j] + to_weight;
            }
            store(grad_x + i, out);
        });
    }
    if (!HELD) return;
    if (blockDim.y == 1) {
        each_vector<V, HELD>(size, [&](int64_t i, int n) {
            Vector<float, V> sum;
            for (int j = 0; j < V; ++j) sum.at[j] = own[n * V + j];
            store(part + i, sum);
        });
        return;
    }
    // The rows side by side in a block meet in shared memory [blockDim.y, D].
    float* meeting = reinterpret_cast<float*>(dynamic_shared);
    each_vector<V, HELD>(size, [&](int64_t i, int n) {
        for (int j = 0; j < V; ++j) meeting[threadIdx.y * size + i + j] = own[n * V + j];
    });
    __syncthreads();
    for (int64_t i = threadIdx.y * blockDim.x + threadIdx.x; i < size; i += blockDim.x * blockDim.y) {
        float sum = 0;
        for (unsigned y = 0; y < blockDim.y; ++y) sum += meeting[y * size + i];
        part[i] = sum;
    }
}

// parts [P, D] → their sum over P, rounded once. A block takes 32 columns.
constexpr int SUM_ROWS = 16;
template <typename T>
__global__ void __launch_bounds__(32 * SUM_ROWS) sum_parts(const float* parts, T* out, int64_t count, int64_t size) {
    __shared__ float sums[SUM_ROWS][33];
    const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
    float sum = 0;
    if (column < size) {
#pragma unroll 4
        for (int64_t part = threadIdx.y; part < count; part += SUM_ROWS) sum += parts[part * size + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= size) return;
    for (int y = 1; y < SUM_ROWS; ++y) sum += sums[y][threadIdx.x];
    out[column] = from_float<T>(sum);
}

// --- how many threads work on a row ----------------------------------------------------------------------------------

// Whole warps and one row, or a part of a warp and several rows.
dim3 block_for(int64_t threads, int64_t most) {
    if (threads > 32) return dim3(std::min(most, ceil_div(threads, 32) * 32));
    unsigned power = 1;
    while (power < threads) power *= 2;
    return dim3(power, 128 / power);
}

// Calls f with V and HELD as types, for what the row's size, its place in memory and the registers allow.
template <typename T, int MOST_HELD, typename F>
int with_vectors(bool aligned, int64_t size, int64_t most_threads, F f) {
    constexpr int FULL = VECTOR_BYTES / sizeof(T);
    std::integral_constant<int, FULL> full;
    std::integral_constant<int, 0> none;
    if (!aligned) return f(std::integral_constant<int, 1>{}, none);
    if (size <= 512 * 2 * FULL) return f(full, std::integral_constant<int, 2>{});
    if (size <= most_threads * MOST_HELD * FULL) return f(full, std::integral_constant<int, MOST_HELD>{});
    return f(full, none);
}
}  // namespace

// out = rms_norm(x), or with a residual summed = residual + x, out = rms_norm(summed). x and residual: [n0, n1, n2, D]
// with any steps in front of D, out and summed contiguous. residual and summed are both null or both not.
extern "C" int llama_mm_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* summed,
                                 int64_t n0, int64_t n1, int64_t n2, int64_t size, int64_t x0, int64_t x1, int64_t x2,
                                 int64_t residual0, int64_t residual1, int64_t residual2, float eps, int dtype,
                                 void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        bool whole = aligned<VECTOR_BYTES / sizeof(T)>(
            static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
            static_cast<T*>(out), static_cast<T*>(summed), size, x0, x1, x2, residual0, residual1, residual2);
        return with_vectors<T, 4>(whole, size, 1024, [&](auto v, auto held) {
            constexpr int V = decltype(v)::value, HELD = decltype(held)::value;
            dim3 block = block_for(ceil_div(size, V * (HELD ? HELD : 4)), 1024);
            int64_t blocks = ceil_div(n0 * n1 * n2, block.y);
            if (blocks > MAX_BLOCKS) return int(cudaErrorInvalidConfiguration);
            return launch(forward<T, V, HELD>, dim3(blocks), block, 0, stream, x, Rows{n1, n2, x0, x1, x2}, residual,
                          Rows{n1, n2, residual0, residual1, residual2}, weight, out, summed, n0 * n1 * n2, size, eps);
        });
    });
}

// The gradients of x (where there was a residual also its own) and weight. grad, x: [n0, n1, n2, D] with any steps;
// grad_sum likewise, or null; grad_x contiguous; parts: fp32 [P, D], room for P blocks' sums.
extern "C" int llama_mm_rms_norm_backward(const void* grad, const void* grad_sum, const void* x, const void* weight,
                                          void* grad_x, void* grad_weight, void* parts, int64_t count, int64_t n0,
                                          int64_t n1, int64_t n2, int64_t size, int64_t grad0, int64_t grad1,
                                          int64_t grad2, int64_t sum0, int64_t sum1, int64_t sum2, int64_t x0,
                                          int64_t x1, int64_t x2, float eps, int dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        bool whole = aligned<VECTOR_BYTES / sizeof(T)>(
            static_cast<const T*>(grad), static_cast<const T*>(grad_sum), static_cast<const T*>(x),
            static_cast<const T*>(weight), static_cast<T*>(grad_x), size, grad0, grad1, grad2, sum0, sum1, sum2, x0, x1,
            x2);
        int error = with_vectors<T, sizeof(T) == 4 ? 4 : 2>(whole, size, 512, [&](auto v, auto held) {
            constexpr int V = decltype(v)::value, HELD = decltype(held)::value;
            dim3 block = block_for(ceil_div(size, V * (HELD ? HELD : 4)), 512);
            if (!HELD) block = dim3(std::max(32u, block.x));  // a row a block: its sums lie in memory
            size_t meeting = block.y > 1 ? block.y * size * sizeof(float) : 0;
            return launch(backward<T, V, HELD>, dim3(count), block, meeting, stream, grad,
                          Rows{n1, n2, grad0, grad1, grad2}, grad_sum, Rows{n1, n2, sum0, sum1, sum2}, x,
                          Rows{n1, n2, x0, x1, x2}, weight, grad_x, parts, n0 * n1 * n2, size, eps);
        });
        if (error) return error;
        return launch(sum_parts<T>, dim3(ceil_div(size, 32)), dim3(32, SUM_ROWS), 0, stream, parts, grad_weight, count,
                      size);
    });
}
