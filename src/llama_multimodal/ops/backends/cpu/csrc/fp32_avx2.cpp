// Attention and linear layers in fp32 products with vectors of 8.
#define LANES 8
#include "attention_fp32.h"
#include "linear_fp32.h"

namespace llama_mm {
extern const Attention kFp32AttentionAvx2[2] = {in_fp32<float>(), in_fp32<uint16_t>()};
extern const WideProduct kWideProductAvx2 = {kTogether, order_weights, widen_values, multiply_rows, finish_row};
}
