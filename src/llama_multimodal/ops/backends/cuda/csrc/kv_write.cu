// kv_write: new keys and values, each token to its slot of a paged cache.
//
// Shapes: T tokens · Hkv key heads · D head dim · N blocks · S slots of a block · V elements of a vector
//
// A block takes one token's keys or its values. What has no slot, or one that the cache does not have, is dropped.
#include "common.cuh"

#include <algorithm>

namespace {

// [T, Hkv, D] with any steps before D → [N · S, Hkv, D]
template <typename From, typename To>
struct Move {
    const From* from;
    To* to;
    int64_t token_step, head_step;
};

template <typename From, typename To, int V>
__global__ void __launch_bounds__(256)
    write(Move<From, To> k, Move<From, To> v, const int64_t* slots, int64_t num_slots, unsigned columns, unsigned dim) {
    const bool is_v = blockIdx.y;
    const int64_t head_step = is_v ? v.head_step : k.head_step;
    const int64_t slot = slots[blockIdx.x];
    if (slot < 0 || slot >= num_slots) return;
    const From* from = (is_v ? v.from : k.from) + blockIdx.x * (is_v ? v.token_step : k.token_step);
    To* to = (is_v ? v.to : k.to) + slot * columns;
    for (unsigned i = threadIdx.x * V; i < columns; i += blockDim.x * V) {
        const auto x = load<From, V>(from + i / dim * head_step + i % dim);
        if constexpr (std::is_same_v<From, To>) {
            store(to + i, x);
        } else {
            Vector<To, V> y;
            for (int j = 0; j < V; ++j) y.at[j] = from_float<To>(to_float(x.at[j]));
            store(to + i, y);
        }
    }
}
}  // namespace

// k, v: [T, Hkv, D] with any steps before D; k_cache, v_cache: [N, S, Hkv, D], contiguous, of another dtype if need be.
extern "C" int llama_mm_kv_write(const void* k, const void* v, void* k_cache, void* v_cache, const void* slots,
                                 int64_t tokens, int64_t heads, int64_t dim, int64_t num_slots, int64_t k_token,
                                 int64_t k_head, int64_t v_token, int64_t v_head, int dtype, int cache_dtype,
                                 void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        return with_dtype(cache_dtype, [&](auto cache_zero) {
            using From = decltype(zero);
            using To = decltype(cache_zero);
            constexpr int V = VECTOR_BYTES / std::max(sizeof(From), sizeof(To));
            const Move<From, To> keys = {static_cast<const From*>(k), static_cast<To*>(k_cache), k_token, k_head};
            const Move<From, To> values = {static_cast<const From*>(v), static_cast<To*>(v_cache), v_token, v_head};
            auto start = [&](auto kernel, int vector) {
                const int64_t threads = std::min<int64_t>(256, ceil_div(ceil_div(heads * dim, vector), 32) * 32);
                return launch(kernel, dim3(tokens, 2), dim3(threads), 0, stream, keys, values, slots, num_slots,
                              heads * dim, dim);
            };
            if (tokens > MAX_BLOCKS || heads * dim > MAX_BLOCKS) return int(cudaErrorInvalidConfiguration);
            if (aligned<V>(keys.from, keys.to, values.from, values.to, dim, k_token, k_head, v_token, v_head))
                return start(write<From, To, V>, V);
            return start(write<From, To, 1>, 1);
        });
    });
}
