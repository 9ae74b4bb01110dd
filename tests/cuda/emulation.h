// What kernels.cu needs of CUDA, on a CPU: every thread of a block is a fiber that runs up to its next barrier, and
// blocks run one after another. To ThreadSanitizer the fibers are threads that only the kernel's own barriers order, so
// that it finds a missing barrier whatever order the fibers happen to run in. Shuffles and ballots exchange registers
// and order no memory, as CUDA has it. SKIPPED_BARRIER=<line of kernels.cu> leaves that barrier out.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <source_location>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

#define threadIdx emulation::current()->index
#define blockIdx emulation::block.index
#define blockDim emulation::block.size

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81 };
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e ? "invalid configuration argument" : "no error"; }

namespace sparsekit::cuda {
namespace emulation {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr int kWarp = 32, kMaxThreads = 1024, kStack = 256 << 10, kMaxShared = 227 << 10;

struct Index {
  unsigned x;
};

struct Barrier {
  std::atomic<int> waiting = 0, turn = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Index index;
  std::atomic<bool> running = false;
  std::atomic<const Barrier*> barrier = nullptr;  // where it waits for another turn
  std::atomic<int> turn = 0;
#ifdef __SANITIZE_THREAD__
  void* tsan = __tsan_get_current_fiber();
#endif
};

struct Block {
  Index index, size;
  const std::function<void()>* kernel;
  std::unique_ptr<float[]> shared;
  Barrier all, warps[kMaxThreads / kWarp];
  std::atomic<uint32_t> registers[kMaxThreads];  // that a warp exchanges
};

inline Block block;
inline Fiber scheduler;
inline std::atomic<Fiber*> running = &scheduler;

inline Fiber* current() { return running.load(kRelaxed); }

inline void switch_to(Fiber& next) {
  Fiber& from = *current();
  running.store(&next, kRelaxed);
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(next.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &next.context);
#else
  // As swapcontext, but without its system calls.
  if (_setjmp(from.jump)) return;
  from.started = true;
  if (next.started) _longjmp(next.jump, 1);
  setcontext(&next.context);
#endif
}

inline void wait(Barrier& barrier, int threads, bool orders_memory) {
  const auto arrive = orders_memory ? std::memory_order_acq_rel : kRelaxed;
  const auto open = orders_memory ? std::memory_order_release : kRelaxed;
  const auto leave = orders_memory ? std::memory_order_acquire : kRelaxed;
  const int turn = barrier.turn.load(kRelaxed);
  if (barrier.waiting.fetch_add(1, arrive) + 1 == threads) {
    barrier.waiting.store(0, kRelaxed);
    barrier.turn.store(turn + 1, open);
  }
  current()->turn.store(turn, kRelaxed);
  current()->barrier.store(&barrier, kRelaxed);
  while (barrier.turn.load(leave) == turn) switch_to(scheduler);
}

inline void wait_for_warp(bool orders_memory) { wait(block.warps[current()->index.x / kWarp], kWarp, orders_memory); }

// f(held), where held(lane) is what a lane of the warp brought.
template <class F>
auto exchange(uint32_t value, const F& f) {
  const unsigned thread = current()->index.x;
  block.registers[thread].store(value, kRelaxed);
  wait_for_warp(false);
  const auto result = f([&](int lane) { return block.registers[thread / kWarp * kWarp + lane].load(kRelaxed); });
  wait_for_warp(false);
  return result;
}

inline bool skipped(const std::source_location& at) {
  static const char* const line = std::getenv("SKIPPED_BARRIER");
  return line && static_cast<int>(at.line()) == std::atoi(line);
}

inline void run_fiber() {
  for (;;) {
    current()->running.load(std::memory_order_acquire);
    (*block.kernel)();
    current()->running.store(false, std::memory_order_release);
    switch_to(scheduler);
  }
}

inline Fiber& fiber(int thread) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (static_cast<int>(fibers.size()) <= thread) {
    Fiber& f = *fibers.emplace_back(std::make_unique<Fiber>());
    f.index.x = static_cast<unsigned>(fibers.size() - 1);
    f.stack = std::make_unique_for_overwrite<char[]>(kStack);
#ifdef __SANITIZE_THREAD__
    f.tsan = __tsan_create_fiber(0);
#endif
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  return *fibers[thread];
}

inline bool waits(const Fiber& f) {
  const Barrier* const barrier = f.barrier.load(kRelaxed);
  return barrier && barrier->turn.load(kRelaxed) == f.turn.load(kRelaxed);
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    fiber(t).barrier.store(nullptr, kRelaxed);
    fiber(t).running.store(true, std::memory_order_release);
  }
  for (bool any = true; any;) {
    any = false;
    for (int t = 0; t < threads; ++t) {
      if (!fiber(t).running.load(std::memory_order_acquire) || waits(fiber(t))) continue;
      any = true;
      switch_to(fiber(t));
    }
  }
  for (int t = 0; t < threads; ++t) {
    if (!fiber(t).running.load(kRelaxed)) continue;
    std::fputs("deadlock: some threads wait at a barrier that others do not reach\n", stderr);
    std::abort();
  }
}

}  // namespace emulation

using std::fmaf, std::max, std::min;

// As large as the launch says, so that AddressSanitizer sees every step beyond.
inline float* shared_floats() { return emulation::block.shared.get(); }

using Half = _Float16;

struct BFloat16 {
  uint16_t bits;
};

inline float __half2float(Half v) { return static_cast<float>(v); }
inline Half __float2half_rn(float v) { return static_cast<Half>(v); }
inline float __bfloat162float(BFloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline BFloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline int __popc(unsigned v) { return std::popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int32_t atomicAdd(int32_t* to, int32_t v) { return std::atomic_ref(*to).fetch_add(v, emulation::kRelaxed); }
inline void __syncthreads(std::source_location at = std::source_location::current()) {
  if (!emulation::skipped(at)) emulation::wait(emulation::block.all, static_cast<int>(blockDim.x), true);
}
inline void __syncwarp(std::source_location at = std::source_location::current()) {
  if (!emulation::skipped(at)) emulation::wait_for_warp(true);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  return emulation::exchange(v, [](const auto& held) {
    unsigned all = 0;
    for (int lane = 0; lane < emulation::kWarp; ++lane) all |= held(lane) << lane;
    return all;
  });
}
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  const auto bits = std::bit_cast<uint32_t>(v);
  return std::bit_cast<T>(emulation::exchange(bits, [&](const auto& held) { return held(lane); }));
}
template <class T>
T __shfl_xor_sync(unsigned all, T v, int bits) {
  return __shfl_sync(all, v, static_cast<int>(threadIdx.x % emulation::kWarp) ^ bits);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*,
           Arguments... arguments) {
  const bool fits = blocks > 0 && blocks <= std::numeric_limits<int32_t>::max() && threads > 0 &&
                    threads <= emulation::kMaxThreads && shared_bytes <= emulation::kMaxShared;
  if (!fits) return cudaErrorInvalidConfiguration;
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulation::block.kernel = &body;
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    emulation::block.shared = std::make_unique_for_overwrite<float[]>(shared_bytes / 4);
    std::fill_n(shared_floats(), shared_bytes / 4, NAN);
    emulation::run_block(threads);
  }
  return cudaSuccess;
}

}  // namespace sparsekit::cuda
