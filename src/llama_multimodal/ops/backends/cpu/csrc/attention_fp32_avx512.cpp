// Attention in fp32 with vectors of 16.
#define LANES 16
#include "attention_fp32.h"

namespace llama_mm {
extern const Attention kFp32Avx512[2] = {in_fp32<float>(), in_fp32<uint16_t>()};
}
