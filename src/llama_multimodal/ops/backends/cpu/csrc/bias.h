// A bias in fp32 with zeros behind it, or zeros alone; `values` is null where there is no memory.
#pragma once

#include "scalar.h"
#include "scratch.h"

namespace {

struct Bias {
  const Scratch memory;
  float* const values;

  Bias(const void* bias, int dtype, int64_t outputs, int64_t padded)
      : memory(padded * 4), values(reinterpret_cast<float*>(memory.memory)) {
    if (values)
      for (int64_t n = 0; n < padded; n++)
        values[n] = bias && n < outputs ? get(bias, static_cast<llama_mm::DType>(dtype), n) : 0.0f;
  }
};

}  // namespace
