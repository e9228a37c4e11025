// decode_attention, paged_decode_attention and, for few tokens, cross_attention: one query a head and token over keys
// that a cache holds dense, in pages that a table names, or in a range of it.
//
// Shapes: B rows · T tokens · H query heads · Hkv key heads · D head dim · C slots of a row · N pages · S slots of a
// page (what the ops call a block; here that is CUDA's) · M pages of a row · P splits · V elements of a vector
//
// A block takes one token, one key head and one split of the token's keys, for all query heads that share the key head
// (GROUP at a time), so that keys and values are read once. Its warps take turns at the keys. LANES neighbouring lanes
// hold one key or value, a vector each, and a lane has HELD of both under way: the values while it works on the keys,
// the next keys while it works on the values. Every warp runs its own softmax; the warps meet in shared memory, and the
// splits in a second kernel.
#include "common.cuh"

#include <algorithm>

namespace {

constexpr int WARPS = 4;  // of a block
constexpr int HELD = 4;   // keys a lane works on at a time
constexpr int MOST_DIM = 128;
constexpr float LOG2_E = 1.44269504088896341f;  // the softmax runs in powers of two
constexpr float SLACK = 8;                      // by which a logit may pass the base of its softmax

// Elements between rows (or pages), heads and keys.
struct Steps {
    int64_t outer, head, key;
};

// key / size for any key of 31 bits, without a division: size · magic is 2^shift, and less than `size` more.
struct Pages {
    unsigned size, shift, magic;
    explicit Pages(int64_t slots) : size(unsigned(slots)), shift(31) {
        while (size > uint64_t(1) << (shift - 31)) ++shift;
        magic = unsigned(((uint64_t(1) << shift) + size - 1) / size);
    }
    __device__ __forceinline__ unsigned of(unsigned key) const { return unsigned(uint64_t(key) * magic >> shift); }
};

template <typename T>
struct Problem {
    const T *q, *k, *v;    // [B, H, T, D]; [B, Hkv, C, D], [N, Hkv, S, D] or [Hkv, C, D]; any steps before D
    T* out;                // [B, T, H, D]
    float *parts, *logs;   // [B, T, H, P, D] and [B, T, H, P]: each split's attention, and log₂ of its sum
    const int32_t* bounds; // [B]; or, ranged, [B, T, 2]
    const int32_t* table;  // [B, M], or null
    const float* bias;     // [C], or null
    int64_t q_row, q_head, q_token, table_row;
    Steps k_steps, v_steps;
    unsigned tokens, heads, kv_heads, splits, num_pages;
    int dim, capacity;
    Pages pages;
    bool ranged;
};

// How a block divides its work among lanes, and what it keeps in shared memory, in floats.
template <typename T, int LANES_, int GROUP_>
struct Layout {
    static constexpr int LANES = LANES_, GROUP = GROUP_, V = VECTOR_BYTES / sizeof(T), WIDTH = LANES * V;
    static constexpr int BLOCKS = GROUP == 8 ? 2 : GROUP == 4 ? 3 : 4;  // of a multiprocessor: what registers allow
    static constexpr int ACROSS = 32 / LANES;                           // keys side by side in a warp
    static constexpr int STEP = WARPS * HELD * ACROSS;                  // keys of a step of the block
    // A warp computes ACROSS times [GROUP, HELD] logits, and shares them out among the lanes.
    static constexpr int LOGITS = GROUP * HELD;
    static constexpr int OWN = LOGITS > LANES ? LOGITS / LANES : 1;        // of a lane, all of one head
    static constexpr int PER_HEAD = LANES / GROUP;                         // neighbouring lanes of one head
    static constexpr int COPIES = PER_HEAD > HELD ? PER_HEAD / HELD : 1;   // neighbouring lanes with the same logit
    static constexpr int QUERIES = GROUP * WIDTH;      // [GROUP, V / 4, LANES, 4]: neighbours read other banks
    static constexpr int WEIGHTS = ACROSS * LOGITS;    // of a warp, [ACROSS, HELD, GROUP]
    static constexpr int STATE = GROUP * (WIDTH + 2);  // of a warp: sums [GROUP, WIDTH]; base and total [GROUP, 2]
    static constexpr int SHARED = QUERIES + WARPS * (WEIGHTS + STATE);
    static_assert(PER_HEAD * GROUP == LANES && OWN <= HELD);
};

// Sums COUNT values over WIDTH neighbouring lanes, halving what a lane keeps where it can. Lane l is left with the sums
// of values l · COUNT / WIDTH and on, or of value l / (WIDTH / COUNT).
template <int COUNT, int WIDTH>
__device__ __forceinline__ void scatter_sums(float* x, int lane) {
    if constexpr (WIDTH > 1) {
        constexpr int STEP = WIDTH / 2, HALF = COUNT > 1 ? COUNT / 2 : 1;
        const bool upper = lane & STEP;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float sent = COUNT > 1 && !upper ? x[COUNT - HALF + i] : x[i];
            const float kept = COUNT > 1 && upper ? x[COUNT - HALF + i] : x[i];
            x[i] = kept + __shfl_xor_sync(~0u, sent, STEP);
        }
        scatter_sums<HALF, STEP>(x, lane);
    }
}

template <typename T, typename L, bool WHOLE>
__global__ void __launch_bounds__(32 * WARPS, L::BLOCKS) attend(const Problem<T> p) {
    constexpr int LANES = L::LANES, GROUP = L::GROUP, V = L::V, ACROSS = L::ACROSS;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, across = lane / LANES, place = lane % LANES;
    const unsigned group = p.heads / p.kv_heads, chunks = (group + GROUP - 1) / GROUP;
    const unsigned chunk = blockIdx.x % chunks, split = blockIdx.x / chunks % p.splits;
    const unsigned kv_head = blockIdx.x / chunks / p.splits % p.kv_heads;
    const unsigned token = blockIdx.x / chunks / p.splits / p.kv_heads, row = token / p.tokens;
    const int head = kv_head * group + chunk * GROUP, members = min(GROUP, int(group - chunk * GROUP));
    const int64_t result = int64_t(token) * p.heads + head;  // of [B, T, H]

    int first = p.ranged ? max(p.bounds[2 * token], 0) : 0;
    int end = min(p.bounds[p.ranged ? 2 * token + 1 : token], p.capacity);
    // A split is a part of what the row holds, not of what it could hold: all of them have work.
    const unsigned part = (max(end - first, 0) + p.splits - 1) / p.splits;
    const int share = (part + L::STEP - 1) / L::STEP * L::STEP;
    first += split * share;
    end = min(end, first + share);
    if (first >= end && p.splits > 1) {
        if (thread < members) p.logs[(result + thread) * p.splits + split] = -INFINITY;
        return;
    }

    float* const queries = reinterpret_cast<float*>(dynamic_shared);
    float* const weights = queries + L::QUERIES + warp * L::WEIGHTS;
    const T* q = p.q + row * p.q_row + token % p.tokens * p.q_token + head * p.q_head;
    const float scale = LOG2_E * rsqrtf(float(p.dim));
    for (int i = thread; i < L::QUERIES; i += 32 * WARPS) {
        const int h = i / L::WIDTH, d = i % L::WIDTH;
        const float x = h < members && d < p.dim ? to_float(q[h * p.q_head + d]) * scale : 0;
        queries[((h * (V / 4) + d % V / 4) * LANES + d / V) * 4 + d % 4] = x;
    }
    __syncthreads();

    // No load waits for a condition: a key past the end is read as the last one, and hidden by its logit; lanes past D
    // read the first vector again, and have zeros for queries.
    const int64_t in_key = place * V < p.dim ? place * V : 0;
    const T *k = p.k + kv_head * p.k_steps.head + in_key, *v = p.v + kv_head * p.v_steps.head + in_key;
    float unknown = 0;  // NaN once a page is named that the cache does not have: shows, where other keys would not
    auto read = [&](uint4* held, const T* from, const Steps& steps, int base) {
        unsigned outer[HELD], slot[HELD];
#pragma unroll
        for (int j = 0; j < HELD; ++j) outer[j] = row, slot[j] = min(base + j * ACROSS + across, end - 1);
        if (p.table) {
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                const unsigned page = p.pages.of(slot[j]);
                outer[j] = p.table[row * p.table_row + page];
                slot[j] -= page * p.pages.size;
                if (outer[j] >= p.num_pages) outer[j] = 0, unknown = nanf("");
            }
        }
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const T* at = from + outer[j] * steps.outer + slot[j] * steps.key;
            if (WHOLE) {
                held[j] = *reinterpret_cast<const uint4*>(at);
            } else {
                Vector<T, V> vector = {};
                for (int e = 0; e < V; ++e)
                    if (in_key + e < p.dim) vector.at[e] = at[e];
                memcpy(&held[j], &vector, sizeof vector);
            }
        }
    };

    const int own = place / L::COPIES * L::OWN;  // the first of this lane's logits; all are of one head
    const bool leads = across == 0 && place % L::PER_HEAD == 0;  // one lane of each head
    float base = -INFINITY, shift = 0, total = 0;  // of its softmax: Σ 2^(logit - shift), shift = base where finite
    float out[GROUP][V] = {};
    uint4 keys[HELD], values[HELD];
    int start = first + warp * HELD * ACROSS;
    if (start < end) {
        read(keys, k, p.k_steps, start);
        read(values, v, p.v_steps, start);
    }
    for (; start < end; start += L::STEP) {
        float bias[L::OWN];
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
            bias[i] = unknown;
            if (p.bias) bias[i] += p.bias[min(start + (own + i) % HELD * ACROSS + across, end - 1)] * LOG2_E;
        }
        float logits[L::LOGITS] = {};
        Vector<T, V> key[HELD];
        memcpy(key, keys, sizeof key);
#pragma unroll
        for (int h = 0; h < GROUP; ++h) {
#pragma unroll
            for (int piece = 0; piece < V / 4; ++piece) {
                const auto query = load<float, 4>(queries + ((h * (V / 4) + piece) * LANES + place) * 4);
#pragma unroll
                for (int j = 0; j < HELD; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        logits[h * HELD + j] += query.at[e] * to_float(key[j].at[piece * 4 + e]);
            }
        }
        scatter_sums<L::LOGITS, LANES>(logits, place);
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
            const bool seen = start + (own + i) % HELD * ACROSS + across < end;
            logits[i] = seen ? logits[i] + bias[i] : -INFINITY;
            most = fmaxf(most, logits[i]);
        }
        // The base follows the largest logit only where that runs away from it, which is seldom: fp32 has room.
        if (__any_sync(~0u, most > base + SLACK)) {
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                if (step >= LANES || step < L::PER_HEAD) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            most = fmaxf(most, base);
            const float kept = most == base ? 1 : exp2f(base - most);
            base = most;
            shift = most == -INFINITY ? 0 : most;
            total *= kept;
            if (leads) weights[own / HELD] = kept;
            __syncwarp();
#pragma unroll
            for (int h = 0; h < GROUP; ++h)
#pragma unroll
                for (int e = 0; e < V; ++e) out[h][e] *= weights[h];
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < L::OWN; ++i) {
            const float weight = exp2f(logits[i] - shift);
            total += weight;
            if (place % L::COPIES == 0) weights[(across * HELD + (own + i) % HELD) * GROUP + own / HELD] = weight;
        }
        __syncwarp();
        // Behind a barrier, here and below: moved ahead, these loads would want registers of their own.
        read(keys, k, p.k_steps, start + L::STEP);
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const auto weight = load<float, GROUP>(weights + (across * HELD + j) * GROUP);
            Vector<T, V> value;
            memcpy(&value, &values[j], sizeof value);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float x = to_float(value.at[e]);
#pragma unroll
                for (int h = 0; h < GROUP; ++h) out[h][e] += weight.at[h] * x;
            }
        }
        __syncwarp();
        read(values, v, p.v_steps, start + L::STEP);
    }

    // Keys side by side in the warp come together in it, the warps in shared memory.
    float* const states = queries + L::QUERIES + WARPS * L::WEIGHTS;
    float* const state = states + warp * L::STATE;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        if (step >= LANES || (step < L::PER_HEAD && step >= L::COPIES)) total += __shfl_xor_sync(~0u, total, step);
    if (leads) {
        state[GROUP * L::WIDTH + own / HELD * 2] = base;
        state[GROUP * L::WIDTH + own / HELD * 2 + 1] = total;
    }
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
#pragma unroll
            for (int step = 16; step >= LANES; step /= 2) out[h][e] += __shfl_xor_sync(~0u, out[h][e], step);
            if (across == 0) state[h * L::WIDTH + e * LANES + place] = out[h][e];
        }
    }
    __syncthreads();
    for (int i = thread; i < members * p.dim; i += 32 * WARPS) {
        const int h = i / p.dim, d = i % p.dim;
        const float* softmax = states + GROUP * L::WIDTH + h * 2;
        const float* sums = states + h * L::WIDTH + d % V * LANES + d / V;
        float top = -INFINITY, sum = 0, attention = 0;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, softmax[w * L::STATE]);
        for (int w = 0; w < WARPS; ++w) {
            const float weight = top == -INFINITY ? 1 : exp2f(softmax[w * L::STATE] - top);
            sum += weight * softmax[w * L::STATE + 1];
            attention += weight * sums[w * L::STATE];
        }
        if (sum != 0) attention /= sum;  // without a key that is seen both are 0
        if (p.splits == 1) {
            p.out[(result + h) * p.dim + d] = from_float<T>(attention);
        } else {
            p.parts[((result + h) * p.splits + split) * p.dim + d] = attention;
            if (d == 0) p.logs[(result + h) * p.splits + split] = top + log2f(sum);
        }
    }
}

// The splits' attention, each weighted by its share of the softmax. A block takes one head of one token.
template <typename T>
__global__ void __launch_bounds__(32 * WARPS) join(const float* parts, const float* logs, T* out, int splits, int dim) {
    constexpr int PIECES = MOST_DIM / 32;
    __shared__ float sums[WARPS][MOST_DIM], totals[WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    parts += int64_t(blockIdx.x) * splits * dim;
    logs += int64_t(blockIdx.x) * splits;
    float top = -INFINITY, total = 0, sum[PIECES] = {};
    for (int split = lane; split < splits; split += 32) top = fmaxf(top, logs[split]);
    top = max_lanes(top);
    if (top == -INFINITY) top = 0;
#pragma unroll 4
    for (int split = warp; split < splits; split += WARPS) {
        const float weight = exp2f(logs[split] - top);
        if (weight == 0) continue;  // a split without keys has left nothing to read
        total += weight;
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
            if (lane + 32 * i < dim) sum[i] += weight * parts[int64_t(split) * dim + lane + 32 * i];
    }
    totals[warp] = total;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) sums[warp][lane + 32 * i] = sum[i];
    __syncthreads();
    if (thread >= dim) return;
    total = 0;
    float attention = 0;
    for (int w = 0; w < WARPS; ++w) total += totals[w], attention += sums[w][thread];
    out[int64_t(blockIdx.x) * dim + thread] = from_float<T>(total == 0 ? 0 : attention / total);
}

template <typename T, int LANES, int GROUP, bool WHOLE>
int start(const Problem<T>& p, int64_t rows, void* stream) {
    using L = Layout<T, LANES, GROUP>;
    const int64_t blocks = rows * p.tokens * p.kv_heads * p.splits * ceil_div(p.heads / p.kv_heads, GROUP);
    if (blocks > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
    return launch(attend<T, L, WHOLE>, dim3(blocks), dim3(32 * WARPS), L::SHARED * sizeof(float), stream, p);
}

template <typename T, int LANES>
int with_group(const Problem<T>& p, int64_t rows, void* stream) {
    const unsigned group = p.heads / p.kv_heads;
    if (group == 1) return start<T, LANES, 1, true>(p, rows, stream);
    if (group <= 4) return start<T, LANES, 4, true>(p, rows, stream);
    return start<T, LANES, 8, true>(p, rows, stream);
}
}  // namespace

// See Problem for what the tensors are. parts: with room for the logs behind them; null where there is one split.
// capacity: C, or M · S. Where there is a table, num_pages is N, page_size S, and table_row the step between its rows.
extern "C" int llama_mm_decode_attention(const void* q, const void* k, const void* v, void* out, void* parts,
                                         const void* bounds, const void* table, const void* bias, int64_t rows,
                                         int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t capacity,
                                         int64_t splits, int64_t num_pages, int64_t page_size, int64_t table_row,
                                         int64_t q_row, int64_t q_head, int64_t q_token, int64_t k_outer,
                                         int64_t k_head, int64_t k_key, int64_t v_outer, int64_t v_head, int64_t v_key,
                                         int ranged, int dtype, void* stream) {
    if (dim > MOST_DIM) return cudaErrorInvalidValue;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = VECTOR_BYTES / sizeof(T);
        const int64_t results = rows * tokens * heads;
        auto* sums = static_cast<float*>(parts);
        Problem<T> p = {static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                        static_cast<T*>(out), sums, sums + results * splits * dim,
                        static_cast<const int32_t*>(bounds), static_cast<const int32_t*>(table),
                        static_cast<const float*>(bias), q_row, q_head, q_token, table_row,
                        {k_outer, k_head, k_key}, {v_outer, v_head, v_key}, unsigned(tokens), unsigned(heads),
                        unsigned(kv_heads), unsigned(splits), unsigned(num_pages), int(dim),
                        int(std::min<int64_t>(capacity, INT32_MAX)), Pages(page_size), bool(ranged)};
        const bool whole = aligned<V>(p.k, p.v, dim, k_outer, k_head, k_key, v_outer, v_head, v_key);
        int error = !whole                ? start<T, MOST_DIM / V, 4, false>(p, rows, stream)
                    : dim <= MOST_DIM / 2 ? with_group<T, MOST_DIM / 2 / V>(p, rows, stream)
                                          : with_group<T, MOST_DIM / V>(p, rows, stream);
        if (error || splits == 1) return error;
        if (results > MAX_BLOCKS) return int(cudaErrorInvalidConfiguration);
        return launch(join<T>, dim3(results), dim3(32 * WARPS), 0, stream, sums, p.logs, p.out, splits, dim);
    });
}
