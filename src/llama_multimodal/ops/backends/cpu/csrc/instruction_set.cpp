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
extern const DotTile kDotTilePastCaches;
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
// Whether there is a matrix unit for bf16, and the kernel lets this process use it, for which it wants to be asked.
bool may_use_amx() {
#if defined(__linux__) && !defined(LLAMA_MM_NO_AMX)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kAll = kBf16 | kTiles;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// AVX-512. What is read once is asked for past the outer caches on AMD's: 4 to 12 % in decoding (measured on Zen 5).
const Kernels* avx512() {
  static const Kernels table = [] {
    Kernels made = kAvx512;
    if (__builtin_cpu_is("amd")) made.dot_tile = kDotTilePastCaches;
    return made;
  }();
  return &table;
}

// AVX-512 with a matrix unit for products of many rows.
const Kernels* amx() {
  static const Kernels table = [] {
    Kernels named = kAvx512;
    named.name = "amx";
    named.matrix_unit = true;
    return named;
  }();
  return &table;
}
#endif

const Kernels* find(const char* name) {  // a null name: the best
  auto wanted = [name](const char* set) { return !name || strcmp(name, set) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  if (wanted("amx") && has_avx512 && may_use_amx()) return amx();
  if (wanted("avx512") && has_avx512) return avx512();
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
bool uses_avx512() { return chosen() == avx512() || chosen()->matrix_unit; }

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
#if !defined(LLAMA_MM_NO_AMX)
  if (chosen()->matrix_unit && dtype == kBFloat16) return &kAttentionAmx;
#endif
  if (chosen() == avx512() && dtype == kBFloat16 && multiplies_pairs()) return &kPairsAvx512;
  if (uses_avx512()) return &kFp32AttentionAvx512[dtype];
  if (chosen() == &kAvx2) return &kFp32AttentionAvx2[dtype];
#endif
  return nullptr;
}

const WideProduct* wide_product() {
#if defined(__x86_64__)
  if (uses_avx512()) return &kWideProductAvx512;
  if (chosen() == &kAvx2) return &kWideProductAvx2;
#endif
  return nullptr;
}

const TileLinear* tile_linear(DType x, int64_t inputs) {
#if defined(__x86_64__) && !defined(LLAMA_MM_NO_AMX)
  if (chosen()->matrix_unit && x == kBFloat16 && inputs > 0 && inputs % 32 == 0) return &kTileLinearAmx;
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

// Whether linear layers of many rows have a matrix unit.
int llama_mm_cpu_has_tile_linear(int dtype, int64_t inputs) {
  return llama_mm::tile_linear(static_cast<llama_mm::DType>(dtype), inputs) != nullptr;
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
