// What every kernel here shares: dtypes, vectors of 16 bytes, sums over a group of threads, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// The only dynamic shared memory, under one name for all kernels; each casts it to what it needs.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

// --- dtypes: stored as T, computed in fp32 ---------------------------------------------------------------------------

enum DType : int { FP32 = 0, FP16 = 1, BF16 = 2 };  // as in library.py

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// x as T holds it: where torch's reference stores a value between two steps.
template <typename T>
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// 1 / (1 + e⁻ˣ) for a result in T; the fast functions are off by less than a half-precision T rounds away.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
    return sizeof(T) == 4 ? 1.0f / (1.0f + expf(-x)) : __fdividef(1.0f, 1.0f + __expf(-x));
}

// Calls f with a value of the type that `dtype` stands for; what f returns is a CUDA error code.
template <typename F>
int with_dtype(int dtype, F f) {
    switch (dtype) {
        case FP32: return f(float{});
        case FP16: return f(__half{});
        case BF16: return f(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

// --- vectors ---------------------------------------------------------------------------------------------------------

constexpr int VECTOR_BYTES = 16;  // the widest load and store

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

// In global memory. Moved as words of up to 16 bytes, and stored by an intrinsic: left to itself the compiler splits
// some stores into one an element.
template <typename T, int N>
struct Word {
    static constexpr int BYTES = sizeof(T) * N;
    using Type = std::conditional_t<BYTES % 16 == 0, uint4, std::conditional_t<BYTES % 8 == 0, uint2, T>>;
    static constexpr int COUNT = BYTES / sizeof(Type);
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
    using W = Word<T, N>;
    typename W::Type words[W::COUNT];
#pragma unroll
    for (int i = 0; i < W::COUNT; ++i) words[i] = reinterpret_cast<const typename W::Type*>(from)[i];
    Vector<T, N> vector;
    memcpy(&vector, words, sizeof vector);
    return vector;
}
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
    using W = Word<T, N>;
    typename W::Type words[W::COUNT];
    memcpy(words, &vector, sizeof vector);
#pragma unroll
    for (int i = 0; i < W::COUNT; ++i) __stwb(reinterpret_cast<typename W::Type*>(to) + i, words[i]);
}

// Whether vectors of N can be used: every pointer, and every step in elements, is a multiple of N elements.
template <int N, typename T>
bool fits(const T* pointer) { return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * N) == 0; }
template <int N>
bool fits(int64_t elements) { return elements % N == 0; }
template <int N, typename... All>
bool aligned(All... all) { return (fits<N>(all) && ...); }

// --- sums ------------------------------------------------------------------------------------------------------------

// Over `width` neighbouring lanes, a power of two up to 32; all lanes of the warp take part and get their group's sum.
__device__ __forceinline__ float sum_lanes(float x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ __forceinline__ float max_lanes(float x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// --- launching -------------------------------------------------------------------------------------------------------

constexpr int64_t MAX_BLOCKS = 0x7fffffff;  // in x

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernel<<<grid, block, shared, stream>>>(arguments...), and what the launch returned. Nothing to do is no error.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    return cudaGetLastError();  // and clears it
}
