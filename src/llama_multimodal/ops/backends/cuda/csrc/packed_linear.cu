// packed_linear: a few rows of x times int8 and int4 weights, read in the plain layout and widened in registers.
//
// Shapes: T rows of x · N outputs · K inputs · G values of a group · R rows of the weight
//
// A thread takes 16 bytes, VALUES values, of each of R neighbouring rows of the weight: R loads under way at once.
// blockDim.x threads lie side by side along K, blockDim.y such lines of threads take other outputs, and all of them
// share a tile of x in shared memory. What the threads of a line have gathered is added up once, at the end.
#include "common.cuh"

#include <algorithm>

namespace {

constexpr int MOST_ROWS = 8;   // of x
constexpr int MOST_WARPS = 8;  // of a block
constexpr int PIECE = 8;       // values widened at a time

// --- int8 and int4 as floats -----------------------------------------------------------------------------------------

// Conversions are slow, so a byte is shifted to the top of a float's mantissa and gets an exponent above it: the float
// is the value plus an offset, EVEN or ODD by the value's place. The higher the bits, the smaller the offset.
template <int BITS>
struct Packed;

template <>
struct Packed<8> {
    using Zero = int8_t;
    static constexpr int VALUES = 16;
    static constexpr float EVEN = 384, ODD = 384;
    static constexpr Zero MIDDLE = 0;
};

template <>
struct Packed<4> {
    using Zero = uint8_t;
    static constexpr int VALUES = 32;
    static constexpr float EVEN = 256, ODD = 16;
    static constexpr Zero MIDDLE = 8;
};

using Words = Vector<unsigned, VECTOR_BYTES / sizeof(unsigned)>;  // a vector of whatever

// A parameter of the kernel: an instruction holds one constant, the mask, and a second one would take an instruction.
struct Exponents {
    unsigned even, odd;
};

// Value i of some, plus its offset.
template <int BITS>
__device__ __forceinline__ float widened(const Words& words, int i, Exponents exponents) {
    const unsigned word = words.at[i * BITS / 32];
    const int byte = i * BITS / 8 % 4;
    const unsigned lifted = byte < 2 ? word << (15 - 8 * byte) : word >> (8 * byte - 15);  // to bits 15 to 22
    if (BITS == 8) return __uint_as_float((lifted & 0x007f8000u) ^ exponents.even);  // which turns the sign bit, too
    return __uint_as_float(i % 2 ? (lifted & 0x00780000u) | exponents.odd : (lifted & 0x00078000u) | exponents.even);
}

// --- sums ------------------------------------------------------------------------------------------------------------

// Adds up each of COUNT numbers over LANES neighbouring lanes; lane i gets the sum of number i / (LANES / COUNT).
template <int COUNT, int LANES = 32>
__device__ __forceinline__ float sum_each(const float (&number)[COUNT]) {
    if constexpr (COUNT == 1) {
        return sum_lanes(number[0], LANES);
    } else {  // each half of the lanes goes on with half of the numbers
        constexpr int HALF = COUNT / 2;
        const bool upper = threadIdx.x & LANES / 2;
        float kept[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float low = number[i], high = number[i + HALF];
            kept[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, LANES / 2);
        }
        return sum_each<HALF, LANES / 2>(kept);
    }
}

// --- what the kernels take -------------------------------------------------------------------------------------------

// values: [N, K]; scales: [N, K/G]; zeros: [N, K/G], or null where each is the middle.
struct Weight {
    const void* values;
    const __half* scales;
    const void* zeros;
    int64_t outputs, inputs, group;
};

// x: [T, K] with a step between rows; bias: [N] or null; out: [T, N].
template <typename X>
struct Rows {
    const X *x, *bias;
    X* out;
    int64_t step;
    int count;
};

// --- groups of whole vectors -----------------------------------------------------------------------------------------

// Rows of the weight that a thread takes for t rows of x: as many as there are registers for.
constexpr int rows_of(int t) { return t == 1 ? 8 : 4; }

// The tile of x: [T, blockDim.x, PER] vectors. A thread reads its own PER of a row, and those of eight neighbours would
// share a few banks if they lay in order.
template <int PER>
__device__ __forceinline__ int place(int vector) { return vector ^ (vector >> 3 & (PER - 1)); }

// Fills the tile with `count` vectors of each row, from vector `first` on, and zeros behind them. For the rows that x
// has not got, its last one is taken.
template <typename X, int T, int PER>
__device__ __forceinline__ void fill(Words* tile, const Rows<X>& rows, int64_t first, int count) {
    constexpr int HELD = 4;  // loads under way
    const int size = blockDim.x * PER, runs = T * size / 32, lane = threadIdx.x % 32;  // a run: 32 vectors of one row
    const int warp = (threadIdx.y * blockDim.x + threadIdx.x) / 32, warps = blockDim.x * blockDim.y / 32;
#pragma unroll 1
    for (int start = warp; start < runs; start += HELD * warps) {
        Words held[HELD] = {};
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            const int run = start + n * warps, i = run / T * 32 + lane;
            const X* x = rows.x + min(run % T, rows.count - 1) * rows.step;
            if (i < count) held[n] = load<unsigned, 4>(reinterpret_cast<const unsigned*>(x) + (first + i) * 4);
        }
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            const int run = start + n * warps;
            if (run < runs) tile[run % T * size + place<PER>(run / T * 32 + lane)] = held[n];
        }
    }
}

// A vector of x in fp32.
template <typename X>
__device__ __forceinline__ void widen(const Words& words, float* to) {
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<X, float>) {
            to[i] = __uint_as_float(words.at[i]);
        } else if constexpr (std::is_same_v<X, __half>) {
            __half2 pair;
            memcpy(&pair, &words.at[i], sizeof pair);
            to[2 * i] = __low2float(pair), to[2 * i + 1] = __high2float(pair);
        } else {
            to[2 * i] = __uint_as_float(words.at[i] << 16), to[2 * i + 1] = __uint_as_float(words.at[i] & 0xffff0000u);
        }
    }
}

// vectors: of a row of the weight; per_group: of a group. There are R outputs at least.
template <typename X, int BITS, int T, int R>
__global__ void __launch_bounds__(32 * MOST_WARPS, 2)
    in_vectors(Weight weight, Rows<X> rows, unsigned vectors, unsigned per_group, Exponents exponents) {
    using Format = Packed<BITS>;
    using Zero = typename Format::Zero;
    constexpr int VALUES = Format::VALUES, V = VECTOR_BYTES / sizeof(X), PER = VALUES / V;
    // For one row of x a group's sum is scaled, after offset and zero, times sums of x, are taken off it. That loses
    // some of fp32's bits. Several rows share weights that are scaled first, exactly: a scale has no more than 11 bits.
    constexpr bool SUMS = T == 1 && sizeof(X) == 2;
    constexpr int WORDS = PIECE * BITS / 32;  // of a piece
    auto* tile = reinterpret_cast<Words*>(dynamic_shared);

    const unsigned groups = vectors / per_group;
    const int64_t output = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * R;
    const int64_t row = min(output, weight.outputs - R);  // the last outputs are taken together with some before them
    const auto* words_row = static_cast<const unsigned*>(weight.values) + row * vectors * 4;
    const auto* scales_row = weight.scales + row * groups;
    const auto* zeros_row = static_cast<const Zero*>(weight.zeros) + row * groups;

    float total[R * T] = {};
    for (unsigned first = 0; first < vectors; first += blockDim.x) {
        // Past the end of a row its last vector meets zeros of the tile.
        const unsigned at = min(first + threadIdx.x, vectors - 1), group = at / per_group;
        Words words[R];
        __half scale[R];
        Zero zero[R];
#pragma unroll
        for (int r = 0; r < R; ++r) words[r] = load<unsigned, 4>(words_row + (int64_t(r) * vectors + at) * 4);
#pragma unroll
        for (int r = 0; r < R; ++r) scale[r] = scales_row[int64_t(r) * groups + group];
#pragma unroll
        for (int r = 0; r < R; ++r) zero[r] = weight.zeros ? zeros_row[int64_t(r) * groups + group] : Format::MIDDLE;
        __syncthreads();  // the tile before has been read
        fill<X, T, PER>(tile, rows, int64_t(first) * PER, min(blockDim.x, vectors - first) * PER);
        __syncthreads();

        float part[R] = {}, even = 0, odd = 0;
        // Of the pieces that are unrolled the compiler reads x at once; for more there are no registers.
#pragma unroll(sizeof(X) == 4 ? 1 : MOST_ROWS / T)
        for (int piece = 0; piece < VALUES; piece += PIECE) {
            float w[R][PIECE];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float s = to_float(scale[r]);
#pragma unroll
                for (int i = 0; i < PIECE; ++i) {
                    w[r][i] = widened<BITS>(words[r], i, exponents);
                    if (!SUMS) w[r][i] = w[r][i] * s - ((i % 2 ? Format::ODD : Format::EVEN) + float(zero[r])) * s;
                }
            }
#pragma unroll
            for (int r = 0; r < R; ++r)  // the next piece comes to the front
                for (int i = 0; i + WORDS < 4; ++i) words[r].at[i] = words[r].at[i + WORDS];
#pragma unroll
            for (int t = 0; t < T; ++t) {
                float x[PIECE];
#pragma unroll
                for (int i = 0; i < PIECE; i += V)
                    widen<X>(tile[t * blockDim.x * PER + place<PER>(threadIdx.x * PER + (piece + i) / V)], x + i);
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int i = 0; i < PIECE; ++i) (SUMS ? part[r] : total[r * T + t]) += w[r][i] * x[i];
#pragma unroll
                for (int i = 0; i < PIECE && SUMS; i += 2) even += x[i], odd += x[i + 1];
            }
        }
        if (SUMS) {
            const float offset = Format::EVEN * even + Format::ODD * odd, all = even + odd;
#pragma unroll
            for (int r = 0; r < R; ++r) total[r] += to_float(scale[r]) * (part[r] - offset - float(zero[r]) * all);
        }
    }

    constexpr int COUNT = R * T, EACH = 32 / COUNT;
    auto* parts = reinterpret_cast<float*>(dynamic_shared);  // [blockDim.y, warps, R · T]
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = sum_each(total);
    __syncthreads();  // the last tile has been read
    if (lane % EACH == 0) parts[(threadIdx.y * warps + warp) * COUNT + lane / EACH] = sum;
    __syncthreads();
    const int64_t to = row + threadIdx.x / T;
    const int t = threadIdx.x % T;
    if (threadIdx.x >= COUNT || to < output || t >= rows.count) return;
    sum = rows.bias ? to_float(rows.bias[to]) : 0;
    for (int n = 0; n < warps; ++n) sum += parts[(threadIdx.y * warps + n) * COUNT + threadIdx.x];
    rows.out[t * weight.outputs + to] = from_float<X>(sum);
}

template <typename X, int BITS, int T>
int start(const Weight& weight, const Rows<X>& rows, int64_t processors, void* stream) {
    constexpr int R = rows_of(T), VALUES = Packed<BITS>::VALUES;
    // Steps of equal length along K, of no more than MOST_WARPS / T warps, whose tile has 32 KB at most. The other
    // warps go to other outputs, as long as there are two blocks for each processor.
    const int64_t needed = ceil_div(weight.inputs, VALUES * 32), steps = ceil_div(needed, MOST_WARPS / T);
    const int64_t across = ceil_div(needed, steps), tiles = ceil_div(weight.outputs, R);
    const int64_t down = std::max<int64_t>(1, std::min(MOST_WARPS / across, tiles / (2 * processors)));
    if (ceil_div(tiles, down) > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
    const Exponents exponents = BITS == 8 ? Exponents{0x43c00000u, 0x43c00000u} : Exponents{0x43800000u, 0x41800000u};
    return launch(in_vectors<X, BITS, T, R>, dim3(ceil_div(tiles, down)), dim3(32 * across, down),
                  T * 32 * across * VALUES * sizeof(X), stream, weight, rows, weight.inputs / VALUES,
                  weight.group / VALUES, exponents);
}

// --- anything else ---------------------------------------------------------------------------------------------------

// A warp takes one output, a lane one value at a time.
template <typename X, int BITS>
__global__ void __launch_bounds__(32 * MOST_WARPS) one_by_one(Weight weight, Rows<X> rows) {
    using Format = Packed<BITS>;
    const int64_t output = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (output >= weight.outputs) return;
    const auto* bytes = static_cast<const uint8_t*>(weight.values) + output * weight.inputs * BITS / 8;
    const int64_t groups = weight.inputs / weight.group;
    float total[MOST_ROWS] = {};
    for (int64_t i = threadIdx.x; i < weight.inputs; i += 32) {
        const int64_t at = output * groups + i / weight.group;
        const int zero = weight.zeros ? static_cast<const typename Format::Zero*>(weight.zeros)[at] : Format::MIDDLE;
        const int value = BITS == 8 ? int8_t(bytes[i]) : bytes[i / 2] >> i % 2 * 4 & 15;
        const float w = float(value - zero) * to_float(weight.scales[at]);
#pragma unroll
        for (int t = 0; t < MOST_ROWS; ++t)
            if (t < rows.count) total[t] += w * to_float(rows.x[t * rows.step + i]);
    }
    constexpr int EACH = 32 / MOST_ROWS;
    const float sum = sum_each(total);
    const int t = threadIdx.x / EACH;
    if (threadIdx.x % EACH || t >= rows.count) return;
    rows.out[t * weight.outputs + output] = from_float<X>(sum + (rows.bias ? to_float(rows.bias[output]) : 0));
}

template <typename X, int BITS>
int start(const Weight& weight, const Rows<X>& rows, int64_t processors, void* stream) {
    constexpr int V = VECTOR_BYTES / sizeof(X);
    if (weight.group % Packed<BITS>::VALUES || weight.outputs < rows_of(1) ||
        !aligned<VECTOR_BYTES>(static_cast<const uint8_t*>(weight.values)) ||
        !aligned<V>(rows.x, rows.count > 1 ? rows.step : 0)) {
        const int64_t blocks = ceil_div(weight.outputs, MOST_WARPS);
        if (blocks > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
        return launch(one_by_one<X, BITS>, dim3(blocks), dim3(32, MOST_WARPS), 0, stream, weight, rows);
    }
    if (rows.count == 1) return start<X, BITS, 1>(weight, rows, processors, stream);
    if (rows.count == 2) return start<X, BITS, 2>(weight, rows, processors, stream);
    if (rows.count <= 4) return start<X, BITS, 4>(weight, rows, processors, stream);
    return start<X, BITS, 8>(weight, rows, processors, stream);
}
}  // namespace

// x: [T, K] with a step between rows; see Weight and Rows for the others. bits: 8 or 4; processors: of the device.
extern "C" int llama_mm_packed_linear(const void* x, const void* values, const void* scales, const void* zeros,
                                      const void* bias, void* out, int64_t rows, int64_t step, int64_t outputs,
                                      int64_t inputs, int64_t group, int64_t processors, int bits, int dtype,
                                      void* stream) {
    if (rows > MOST_ROWS) return cudaErrorInvalidValue;
    const Weight weight = {values, static_cast<const __half*>(scales), zeros, outputs, inputs, group};
    return with_dtype(dtype, [&](auto nothing) {
        using X = decltype(nothing);
        const Rows<X> all = {static_cast<const X*>(x), static_cast<const X*>(bias), static_cast<X*>(out), step,
                             int(rows)};
        return bits == 4 ? start<X, 4>(weight, all, processors, stream) : start<X, 8>(weight, all, processors, stream);
    });
}
