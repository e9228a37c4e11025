// Which instruction set runs: the best that this machine has, or the one that LLAMA_MM_CPU_ISA names.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "kernels.h"
#include "linear.h"

namespace llama_mm {

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx512;
extern const Kernels kAvx2;
extern const Attention kAttentionAmx;
extern const Attention kPairsAvx512;
extern const Attention kFp32AttentionAvx512[2];  // by dtype
extern const Attention kFp32AttentionAvx2[2];
extern const TileLinear kTileLinearAmx;
extern const WideProduct kWideProductAvx512;
extern const WideProduct kWideProductAvx2;
#endif

namespace {

#if defined(__x86_64__)
// Whether there is a matrix unit for bf16 and int8, and the kernel lets this process use it: that is asked for once, and
// holds for all of its threads.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// AVX-512 with a matrix unit for products of many rows.
const Kernels kAmx = [] {
  Kernels table = kAvx512;
  table.name = "amx";
  return table;
}();
#endif

const Kernels* find(const char* name) {  // a null name: the best
  auto wanted = [name](const char* set) { return !name || strcmp(name, set) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (wanted("amx") && avx512 && may_use_amx()) return &kAmx;
  if (wanted("avx512") && avx512) return &kAvx512;
  if (wanted("avx2") && avx2) return &kAvx2;
#endif
  return wanted("plain") ? &kPlain : nullptr;
}

const Kernels* named_by_environment() {
  const char* name = getenv("LLAMA_MM_CPU_ISA");
  return find(name && *name ? name : nullptr);
}

const Kernels*& chosen() {
  static const Kernels* table = named_by_environment();
  return table;
}

#if defined(__x86_64__)
// Whether products of bf16 pairs are used. Intel's processors start one in two cycles, half the rate of fp32 (measured
// on Emerald Rapids); AMD's start one or two a cycle.
bool pairs_are_fast() { return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel"); }

bool& multiplies_pairs() {
  static bool does = pairs_are_fast();
  return does;
}
#endif

}  // namespace

const Kernels* kernels() { return chosen(); }

const Attention* attention(DType dtype) {
#if defined(__x86_64__)
  if (chosen() == &kAmx && dtype == kBFloat16) return &kAttentionAmx;
  if (chosen() == &kAvx512 && dtype == kBFloat16 && multiplies_pairs()) return &kPairsAvx512;
  if (chosen() == &kAmx || chosen() == &kAvx512) return &kFp32AttentionAvx512[dtype];
  if (chosen() == &kAvx2) return &kFp32AttentionAvx2[dtype];
#endif
  return nullptr;
}

const WideProduct* wide_product() {
#if defined(__x86_64__)
  if (chosen() == &kAmx || chosen() == &kAvx512) return &kWideProductAvx512;
  if (chosen() == &kAvx2) return &kWideProductAvx2;
#endif
  return nullptr;
}

const TileLinear* tile_linear(DType x, int64_t inputs) {
#if defined(__x86_64__)
  if (chosen() == &kAmx && x == kBFloat16 && inputs % 32 == 0) return &kTileLinearAmx;
#endif
  return nullptr;
}

}  // namespace llama_mm

extern "C" {

// The instruction set in use; null where the environment asks for one that is not there.
const char* llama_mm_cpu_instruction_set() {
  const llama_mm::Kernels* table = llama_mm::kernels();
  return table ? table->name : nullptr;
}

// Use another one from now on; 1 where this machine or this build does not have it. For tests: not while kernels run.
int llama_mm_cpu_use_instruction_set(const char* name) {
  const llama_mm::Kernels* table = llama_mm::find(name);
  if (!table) return 1;
  llama_mm::chosen() = table;
  return 0;
}

// Use products of bf16 pairs from now on (1), or not (0), or where they are fast (-1); 1 where this machine has none.
// For tests: not while kernels run.
int llama_mm_cpu_use_pairs(int use) {
#if defined(__x86_64__)
  if (use > 0 && !__builtin_cpu_supports("avx512bf16")) return 1;
  llama_mm::multiplies_pairs() = use < 0 ? llama_mm::pairs_are_fast() : use > 0;
  return 0;
#else
  return use > 0;
#endif
}

}  // extern "C"
