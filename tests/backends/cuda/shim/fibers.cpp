// Runs a CUDA grid on one thread of the CPU: block after block, each CUDA thread a fiber that gives way at barriers and
// warp exchanges. What a GPU would answer with a hang, garbage or a dead context is found and said: barriers that some
// threads do not reach, lanes that do not come, misaligned vectors, writes past the dynamic shared memory.
#include <csetjmp>
#include <link.h>
#include <pthread.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t MAX_SHARED = 227 * 1024, DEFAULT_SHARED = 48 * 1024, CANARY = 256;
alignas(128) thread_local unsigned char dynamic_shared[MAX_SHARED + CANARY];

namespace shim {
namespace {

constexpr size_t STACK = 128 * 1024;
enum State { RUNNING, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false;
    void* stack = nullptr;
    State state = DONE;
    uint3 index;
    Site site;
    unsigned mask, votes;
    int source;
    unsigned char given[SLOT], taken[SLOT];
};

std::vector<Fiber*> fibers;
jmp_buf scheduler;
Fiber* current;
int current_lane;
const std::function<void()>* job;
unsigned order_seed = 0;
int failed = 0;
std::string message;
std::unordered_map<const void*, size_t> shared_limits;

std::string at(Site site) {
    std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}
bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

std::string name(const Fiber& fiber) {
    return "thread (" + std::to_string(fiber.index.x) + ", " + std::to_string(fiber.index.y) + ", " +
           std::to_string(fiber.index.z) + ")";
}

void record(int code, const std::string& what) {
    if (failed) return;
    failed = code;
    message = what + ", in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
              std::to_string(blockIdx.z) + ")";
}

// --- switching. setjmp is far faster than swapcontext, which asks the kernel for the signal mask each time -----------

__attribute__((noinline)) void pause() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void body() {
    for (;;) {
        (*job)();
        current->state = DONE;
        pause();
    }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

Fiber* fresh() {
    auto* fiber = new Fiber;
    fiber->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK;
    makecontext(&fiber->context, body, 0);
    return fiber;
}

// --- order: a kernel must not depend on which thread comes first -----------------------------------------------------

std::vector<unsigned> permutation(unsigned size, unsigned salt) {
    std::vector<unsigned> order(size);
    for (unsigned i = 0; i < size; ++i) order[i] = order_seed == 1 ? size - 1 - i : i;
    uint64_t random = order_seed * 0x9e3779b97f4a7c15u + salt;
    for (unsigned i = size; order_seed > 1 && i > 1; --i) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[i - 1], order[(random >> 33) % i]);
    }
    return order;
}

// --- shared memory: all thread_local variables of this library -------------------------------------------------------

struct Range {
    unsigned char* begin;
    size_t size;
};

Range shared_memory() {
    static Range range;
    static pthread_t owner;
    static bool known = false;
    if (known && pthread_equal(owner, pthread_self())) return range;
    dynamic_shared[0] = 0;  // makes this thread's copy
    auto find = [](dl_phdr_info* info, size_t, void*) {
        auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
            size_t size = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type == PT_TLS && dynamic_shared >= begin && dynamic_shared < begin + size)
                return range = {begin, size}, 1;
        }
        return 0;
    };
    known = dl_iterate_phdr(find, nullptr) == 1;
    owner = pthread_self();
    return range;
}

void poison(size_t dynamic) {
    Range all = shared_memory();
    size_t before = dynamic_shared - all.begin, after = before + sizeof dynamic_shared;
    memset(all.begin, 0xff, before);
    memset(all.begin + after, 0xff, all.size - after);
    memset(dynamic_shared, 0xff, dynamic);  // NaN in every format
    memset(dynamic_shared + dynamic, 0xa5, CANARY);
}

// --- one block -------------------------------------------------------------------------------------------------------

// Lets lanes of a warp go whose partners have all come. False: none could.
bool release_warp(Fiber** lanes, unsigned size) {
    bool any = false;
    for (unsigned lane = 0; lane < size && !failed; ++lane) {
        Fiber& fiber = *lanes[lane];
        if (fiber.state != AT_WARP) continue;
        if (!(fiber.mask >> lane & 1)) {
            record(cudaErrorLaunchFailure, name(fiber) + " is not in its own mask at " + at(fiber.site));
            return false;
        }
        bool complete = true;
        for (unsigned other = 0; other < 32; ++other) {
            if (!(fiber.mask >> other & 1)) continue;
            complete &= other < size && lanes[other]->state == AT_WARP && lanes[other]->mask == fiber.mask;
            if (complete && !same(lanes[other]->site, fiber.site)) {
                record(cudaErrorLaunchFailure, "lanes of one warp meet at different places: " + name(fiber) + " at " +
                                                   at(fiber.site) + ", " + name(*lanes[other]) + " at " +
                                                   at(lanes[other]->site));
                return false;
            }
        }
        if (!complete) continue;
        unsigned votes = 0, mask = fiber.mask;
        for (unsigned other = 0; other < size; ++other) {
            if (!(mask >> other & 1)) continue;
            static const unsigned char zero[SLOT] = {};
            Fiber& taker = *lanes[other];
            if (!(mask >> taker.source & 1)) {
                record(cudaErrorLaunchFailure, name(taker) + " reads a lane outside the mask at " + at(taker.site));
                return false;
            }
            memcpy(taker.taken, lanes[taker.source]->given, SLOT);
            if (memcmp(taker.given, zero, SLOT) != 0) votes |= 1u << other;
        }
        for (unsigned other = 0; other < size; ++other) {
            if (!(mask >> other & 1)) continue;
            lanes[other]->votes = votes;
            lanes[other]->state = RUNNING;
        }
        any = true;
    }
    return any;
}

// All threads stand: at a barrier, at an exchange, or at the end. False: the block is over, or has failed.
bool release_block(unsigned size) {
    Fiber *waiting = nullptr, *odd = nullptr;
    for (unsigned i = 0; i < size; ++i)
        if (fibers[i]->state == AT_WARP) {
            record(cudaErrorLaunchFailure,
                   name(*fibers[i]) + " waits at " + at(fibers[i]->site) + " for lanes that do not come");
            return false;
        } else if (fibers[i]->state == AT_BLOCK && !waiting) {
            waiting = fibers[i];
        }
    if (!waiting) return false;
    for (unsigned i = 0; i < size; ++i)
        if (fibers[i]->state == DONE || !same(fibers[i]->site, waiting->site)) odd = fibers[i];
    if (odd) {
        std::string other = name(*odd) + (odd->state == DONE ? " has returned" : " at " + at(odd->site));
        record(cudaErrorLaunchFailure,
               "divergent barrier: " + name(*waiting) + " waits at " + at(waiting->site) + ", " + other);
        return false;
    }
    for (unsigned i = 0; i < size; ++i) fibers[i]->state = RUNNING;
    return true;
}

void run_block(unsigned size, size_t dynamic, const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
    poison(dynamic);
    for (unsigned i = 0; i < size; ++i) fibers[i]->state = RUNNING;
    do {
        for (unsigned warp : warps) {
            unsigned first = warp * 32, present = min(32u, size - first);
            do {
                for (unsigned lane : lanes) {
                    if (lane >= present || fibers[first + lane]->state != RUNNING) continue;
                    current_lane = int(lane);
                    resume(*fibers[first + lane]);
                    if (failed) return;
                }
            } while (release_warp(&fibers[first], present));
            if (failed) return;
        }
    } while (release_block(size));
    for (size_t i = 0; i < CANARY; ++i)
        if (dynamic_shared[dynamic + i] != 0xa5)
            record(cudaErrorLaunchFailure, "a write past the block's " + std::to_string(dynamic) +
                                               " bytes of dynamic shared memory");
}

}  // namespace

int lane() { return current_lane; }

unsigned meet_warp(unsigned mask, void* value, size_t bytes, int source, Site site) {
    Fiber& me = *current;
    memset(me.given, 0, SLOT);
    memcpy(me.given, value, bytes);
    me.mask = mask, me.source = source, me.site = site, me.state = AT_WARP;
    pause();
    memcpy(value, me.taken, bytes);
    return me.votes;
}

void meet_block(Site site) {
    current->site = site, current->state = AT_BLOCK;
    pause();
}

void fail(int code, const char* what) {
    record(code, name(*current) + ": " + what);
    for (;;) pause();
}

void must_align(const void* address, size_t alignment, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        fail(cudaErrorMisalignedAddress, ("misaligned address at " + at(site)).c_str());
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || size_t(bytes) > MAX_SHARED) return cudaErrorInvalidValue;
    shared_limits[kernel] = size_t(bytes);
    return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
    dim3 grid = config.gridDim, block = config.blockDim;
    uint64_t size = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    size_t limit = shared_limits.count(kernel) ? shared_limits[kernel] : DEFAULT_SHARED;
    failed = 0;
    if (!size || size > 1024 || block.z > 64 || !blocks || grid.x > 0x7fffffff || max(grid.y, grid.z) > 65535) {
        message = "invalid configuration argument";
        return cudaError_t(failed = cudaErrorInvalidConfiguration);
    }
    if (config.dynamicSmemBytes > limit) {
        message = "invalid argument: " + std::to_string(config.dynamicSmemBytes) + " bytes of dynamic shared memory";
        return cudaError_t(failed = cudaErrorInvalidValue);
    }
    gridDim = grid, blockDim = block, job = &thread;
    while (fibers.size() < size) fibers.push_back(fresh());
    for (unsigned i = 0; i < size; ++i)
        fibers[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    auto warps = permutation(unsigned(size + 31) / 32, 1), lanes = permutation(32, 2);
    for (unsigned i : permutation(unsigned(blocks), 3)) {
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
        run_block(unsigned(size), config.dynamicSmemBytes, warps, lanes);
        if (!failed) continue;
        for (Fiber* fiber : fibers) munmap(fiber->stack, STACK), delete fiber;  // they stand in the middle of a kernel
        fibers.clear();
        break;
    }
    return cudaError_t(failed);
}

}  // namespace shim

cudaError_t cudaGetLastError() {
    cudaError_t code = cudaError_t(shim::failed);
    shim::failed = 0;
    return code;
}
const char* cudaGetErrorString(cudaError_t code) { return code ? shim::message.c_str() : "no error"; }

// --- for the tests ---------------------------------------------------------------------------------------------------

// In which order threads and blocks run: 0 from the first on, 1 from the last, others mixed.
extern "C" void shim_order(unsigned seed) { shim::order_seed = seed; }

// Called by code built with -fsanitize=alignment,bounds; both hand over where in the source it happened.
struct SourceLocation {
    const char* file;
    unsigned line, column;
};
static void report(SourceLocation* where, int code, const char* what) {
    shim::fail(code, (what + std::string(" at ") + shim::at({where->file, int(where->line)})).c_str());
}
extern "C" void __ubsan_handle_type_mismatch_v1(SourceLocation* where, void*) {
    report(where, cudaErrorMisalignedAddress, "misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(SourceLocation* where, void*) {
    report(where, cudaErrorLaunchFailure, "index out of bounds of an array");
}
