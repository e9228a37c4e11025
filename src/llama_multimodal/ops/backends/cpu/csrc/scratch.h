// Memory for the length of a call; null where there is none.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

struct Scratch {
  char* memory;
  explicit Scratch(int64_t bytes)
      : memory(static_cast<char*>(aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)))) {}
  ~Scratch() { free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
