// apply_rope: queries and keys of all heads, turned in one launch. The backward turns by the opposite angle.
//
// Shapes: B rows · T tokens · H heads (q's or k's) · D head dim · V elements of a vector · P rows of the table
//
// A block takes one token of one row, blockDim.y heads at a time. A thread reads the angles of its place once and keeps
// them for all of its heads.
#include "common.cuh"

#include <algorithm>

namespace {

// One tensor: [B, H, T, D] with any steps in front of D → contiguous.
template <typename T>
struct Heads {
    const T* from;
    T* to;
    int count;
    int64_t row_step, head_step, token_step;
};

// cos, sin: [B, T, D/2] with two steps; or [P, D/2] and positions [B, T], token_step then being the table's.
struct Angles {
    const float *cos, *sin;
    const int64_t* positions;
    int64_t table_size, row_step, token_step;
};

template <typename T, int V, bool INTERLEAVED>
__global__ void __launch_bounds__(512)
    rotate(Heads<T> q, Heads<T> k, Angles angles, unsigned tokens, int64_t size, float sign) {
    constexpr int PAIRS = INTERLEAVED && V > 1 ? V / 2 : V;  // of a thread, at one place
    const unsigned row = blockIdx.x / tokens, token = blockIdx.x % tokens;
    int64_t angle = row * angles.row_step + token * angles.token_step;
    bool known = true;
    if (angles.positions) {
        int64_t position = angles.positions[blockIdx.x];
        if (position < 0) position += angles.table_size;  // counts from the end, as in Python
        known = position >= 0 && position < angles.table_size;
        angle = known ? position * angles.token_step : 0;
    }
    for (int64_t i = int64_t(threadIdx.x) * PAIRS; i < size / 2; i += blockDim.x * PAIRS) {
        auto cos = load<float, PAIRS>(angles.cos + angle + i), sin = load<float, PAIRS>(angles.sin + angle + i);
        for (int j = 0; j < PAIRS; ++j) {
            if (!known) cos.at[j] = nanf("");  // a position outside the table shows; nobody waits to look for one
            sin.at[j] *= sign;
        }
        auto turn = [&](float& first, float& second, int j) {
            float x = first;
            first = x * cos.at[j] - second * sin.at[j];
            second = second * cos.at[j] + x * sin.at[j];
        };
        for (int head = threadIdx.y; head < q.count + k.count; head += blockDim.y) {
            const bool is_q = head < q.count;
            const Heads<T>& x = is_q ? q : k;
            const int h = is_q ? head : head - q.count;
            const T* from = x.from + row * x.row_step + h * x.head_step + token * x.token_step;
            T* to = x.to + ((int64_t(row) * x.count + h) * tokens + token) * size;
            if (INTERLEAVED && V > 1) {
                auto v = load<T, V>(from + 2 * i);
                for (int j = 0; j < PAIRS; ++j) {
                    float first = to_float(v.at[2 * j]), second = to_float(v.at[2 * j + 1]);
                    turn(first, second, j);
                    v.at[2 * j] = from_float<T>(first);
                    v.at[2 * j + 1] = from_float<T>(second);
                }
                store(to + 2 * i, v);
            } else {
                const int64_t at_first = INTERLEAVED ? 2 * i : i, at_second = INTERLEAVED ? 2 * i + 1 : i + size / 2;
                auto a = load<T, V>(from + at_first), b = load<T, V>(from + at_second);
                for (int j = 0; j < V; ++j) {
                    float first = to_float(a.at[j]), second = to_float(b.at[j]);
                    turn(first, second, j);
                    a.at[j] = from_float<T>(first);
                    b.at[j] = from_float<T>(second);
                }
                store(to + at_first, a);
                store(to + at_second, b);
            }
        }
    }
}

template <typename T, int V, bool INTERLEAVED>
int start(const Heads<T>& q, const Heads<T>& k, const Angles& angles, int64_t rows, int64_t tokens, int64_t size,
          float sign, void* stream) {
    if (rows * tokens > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
    const int64_t places = std::min<int64_t>(256, ceil_div(size / 2, INTERLEAVED && V > 1 ? V / 2 : V));
    // Rounds of equal size: 40 heads of 8 places are two of 20 and not one of 32 and one of 8.
    const int64_t rounds = ceil_div((q.count + k.count) * places, 256);
    const int64_t heads = ceil_div(q.count + k.count, rounds);
    return launch(rotate<T, V, INTERLEAVED>, dim3(rows * tokens), dim3(places, heads), 0, stream, q, k, angles, tokens,
                  size, sign);
}
}  // namespace

// q: [B, H, T, D] and k with any steps in front of D → q_out, k_out contiguous; see Angles for the rest. sign: 1, or -1
// for the backward.
extern "C" int llama_mm_apply_rope(const void* q, const void* k, void* q_out, void* k_out, const void* cos,
                                   const void* sin, const void* positions, int64_t rows, int64_t q_heads,
                                   int64_t k_heads, int64_t tokens, int64_t size, int64_t q_row, int64_t q_head,
                                   int64_t q_token, int64_t k_row, int64_t k_head, int64_t k_token, int64_t table_size,
                                   int64_t angle_row, int64_t angle_token, float sign, int interleaved, int dtype,
                                   void* stream) {
    Angles angles = {static_cast<const float*>(cos), static_cast<const float*>(sin),
                     static_cast<const int64_t*>(positions), table_size, angle_row, angle_token};
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = VECTOR_BYTES / sizeof(T);
        Heads<T> qs = {static_cast<const T*>(q), static_cast<T*>(q_out), int(q_heads), q_row, q_head, q_token};
        Heads<T> ks = {static_cast<const T*>(k), static_cast<T*>(k_out), int(k_heads), k_row, k_head, k_token};
        const bool whole = aligned<V>(qs.from, qs.to, ks.from, ks.to, q_row, q_head, q_token, k_row, k_head, k_token);
        if (interleaved) {
            if (whole && aligned<V / 2>(angles.cos, angles.sin, angle_row, angle_token, size / 2))
                return start<T, V, true>(qs, ks, angles, rows, tokens, size, sign, stream);
            return start<T, 1, true>(qs, ks, angles, rows, tokens, size, sign, stream);
        }
        if (whole && aligned<V>(angles.cos, angles.sin, angle_row, angle_token, size / 2))
            return start<T, V, false>(qs, ks, angles, rows, tokens, size, sign, stream);
        return start<T, 1, false>(qs, ks, angles, rows, tokens, size, sign, stream);
    });
}
