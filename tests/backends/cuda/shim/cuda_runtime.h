// CUDA's language and the part of its runtime that the kernels use, on the CPU: put this folder first on the include
// path and compile the .cu files with `g++ -x c++`. fibers.cpp runs them, one fiber a CUDA thread, block after block.
// Not here: tensor cores, inline PTX, asynchronous copies, clusters and grid-wide barriers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Allowed both on a variable in a function and behind `extern`; and all of it lies in one place, to be poisoned there.
#define __shared__ thread_local

// --- types -----------------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

#define SHIM_VECTORS(type, name)                                                                                      \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                          \
    struct alignas(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };                           \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                  \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTORS(signed char, char)
SHIM_VECTORS(unsigned char, uchar)
SHIM_VECTORS(short, short)
SHIM_VECTORS(unsigned short, ushort)
SHIM_VECTORS(int, int)
SHIM_VECTORS(unsigned, uint)
SHIM_VECTORS(long long, longlong)
SHIM_VECTORS(unsigned long long, ulonglong)
SHIM_VECTORS(float, float)
SHIM_VECTORS(double, double)
#undef SHIM_VECTORS

// --- threads ---------------------------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace shim {

constexpr size_t SLOT = 16;  // bytes of the largest value that lanes exchange

struct Site {  // where in the source a thread waits
    const char* file;
    int line;
};
// Waits for the lanes in `mask`; `value` is what this lane gives, `source` the lane whose value it takes. Returns the
// lanes that gave something other than zero.
unsigned meet_warp(unsigned mask, void* value, size_t bytes, int source, Site site);
void meet_block(Site site);
int lane();
[[noreturn]] void fail(int code, const char* message);
void must_align(const void* address, size_t alignment, Site site);

template <typename T>
T exchange(unsigned mask, T value, int source, Site site) {
    static_assert(sizeof(T) <= SLOT && std::is_trivially_copyable_v<T>);
    meet_warp(mask, &value, sizeof(T), source, site);
    return value;
}

}  // namespace shim

#define SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_HERE) { shim::meet_block({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, SHIM_HERE) {
    int nothing = 0;
    shim::meet_warp(mask, &nothing, sizeof nothing, shim::lane(), {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_HERE) {
    return shim::exchange(mask, value, (shim::lane() & -width) | (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_HERE) {
    int lane = shim::lane(), source = lane ^ bits;
    return shim::exchange(mask, value, source < (lane & -width) + width ? source : lane, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32, SHIM_HERE) {
    int lane = shim::lane(), source = lane + int(step);
    return shim::exchange(mask, value, source < (lane & -width) + width ? source : lane, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32, SHIM_HERE) {
    int lane = shim::lane(), source = lane - int(step);
    return shim::exchange(mask, value, source >= (lane & -width) ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_HERE) {
    return shim::meet_warp(mask, &predicate, sizeof predicate, shim::lane(), {file, line});
}
inline int __any_sync(unsigned mask, int predicate, SHIM_HERE) {
    return shim::meet_warp(mask, &predicate, sizeof predicate, shim::lane(), {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_HERE) {
    return shim::meet_warp(mask, &predicate, sizeof predicate, shim::lane(), {file, line}) == mask;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { shim::fail(719, "__trap"); }

// One thread of the machine runs all fibers in turn, so plain arithmetic is atomic.
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
    T old = *at;
    *at = max(old, value);
    return old;
}
template <typename T>
T atomicExch(T* at, std::common_type_t<T> value) {
    T old = *at;
    *at = value;
    return old;
}

// --- loads, bits and mathematics -------------------------------------------------------------------------------------

// A vector's address is checked here, so that what is said names the kernel's line.
#define SHIM_LOAD(name)                                                                                                \
    template <typename T>                                                                                              \
    T name(const T* at, SHIM_HERE) {                                                                                   \
        shim::must_align(at, alignof(T), {file, line});                                                                \
        return *at;                                                                                                    \
    }
#define SHIM_STORE(name)                                                                                               \
    template <typename T>                                                                                              \
    void name(T* at, T value, SHIM_HERE) {                                                                             \
        shim::must_align(at, alignof(T), {file, line});                                                                \
        *at = value;                                                                                                   \
    }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldcs)
SHIM_STORE(__stwb)
SHIM_STORE(__stcg)
SHIM_STORE(__stcs)
#undef SHIM_LOAD
#undef SHIM_STORE

template <typename To, typename From>
To shim_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return shim_bits<unsigned>(x); }
inline int __float_as_int(float x) { return shim_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return shim_bits<float>(x); }
inline float __int_as_float(int x) { return shim_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t both = uint64_t(high) << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int8_t(b >> i);
    return sum;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }

// --- the runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
using cudaStream_t = struct shim_stream*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
    int numRegs;
};

namespace shim {
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);
}  // namespace shim

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
    return shim::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(Expected(given)...); });
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return shim::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t = nullptr) {
    return memset(at, value, bytes), cudaSuccess;
}
