// Attention in fp32 with vectors of 8.
#define LANES 8
#include "attention_fp32.h"

namespace llama_mm {
extern const Attention kFp32Avx2[2] = {in_fp32<float>(), in_fp32<uint16_t>()};
}
