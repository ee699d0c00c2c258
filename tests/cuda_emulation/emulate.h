// Runs CUDA thread blocks on the CPU, so that the kernels of csrc/cuda can be checked where there is no GPU.
//
// The very same .cu files are compiled with a host compiler against the small stand-ins for CUDA's headers in this
// folder. Each thread of a block is a fiber that runs until it meets a barrier or a warp exchange; the blocks of a grid run
// one after the other. This proves indexing and arithmetic. It proves nothing about performance, and about races only
// what two schedules can show: warp after warp, each as far as it gets before the block's next barrier, in ascending or
// in descending order (set_descending).
//
// Aborts with a message where the fibers of a block wait at different barriers, and where shared memory beyond the
// size asked for at launch was written. Shared memory starts as NaN in every block.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulate {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kNamedBarriers = 16;
// What one block may use on sm_80, and on sm_90, for which kernels of its own are made.
constexpr size_t kSharedLimit = 166912, kHopperSharedLimit = 232448;
constexpr unsigned char kPoison = 0xff;  // four of them are a NaN

inline bool descending = false;
inline int capability = 80;

inline size_t shared_limit() { return capability >= 90 ? kHopperSharedLimit : kSharedLimit; }

[[noreturn]] inline void fail(const char* message, int line = 0) {
  std::fprintf(stderr, "cuda emulation: %s (line %d)\n", message, line);
  std::abort();
}

// A meeting point of `size` fibers; the last to arrive releases all.
struct Barrier {
  int size = 0;
  int arrived = 0;
  int line = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false;
  bool finished = false;
  Barrier* waiting = nullptr;
  int64_t generation = 0;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  explicit Block(int threads) : warps_((threads + kWarpSize - 1) / kWarpSize), exchange_(threads) {
    while (static_cast<int>(pool().size()) < threads) pool().emplace_back(new Fiber);
    threads_ = threads;
    block_.size = threads;
    for (int warp = 0; warp < static_cast<int>(warps_.size()); ++warp)
      warps_[warp].size = std::min(kWarpSize, threads - warp * kWarpSize);
  }

  void run(const std::function<void()>& body, const std::function<void(int)>& enter) {
    current() = this;
    body_ = &body;
    enter_ = &enter;
    for (int i = 0; i < threads_; ++i) {
      pool()[i]->started = pool()[i]->finished = false;
      pool()[i]->waiting = nullptr;
    }
    const int warps = static_cast<int>(warps_.size());
    for (int finished = 0; finished < threads_;) {
      int progress = 0;
      for (int turn = 0; turn < warps; ++turn) {
        const int warp = descending ? warps - 1 - turn : turn;
        while (const int resumed = run_warp(warp, finished)) progress += resumed;
      }
      if (progress == 0) fail("some threads left the kernel while others wait at a barrier", block_.line);
    }
    for (const Barrier& barrier : named_)
      if (barrier.arrived != 0) fail("a named barrier was left half full");
  }

  void sync_block(int line) { wait(block_, line); }
  void sync_warp(int line) { wait(warps_[running_ / kWarpSize], line); }

  // A named barrier of `threads`, whose threads may stand at different lines.
  void sync_named(int barrier, int threads) { wait(named(barrier, threads), 0); }

  // Every lane of the warp hands in a value; read(lane) then gives what that lane handed in.
  template <typename T, typename Read>
  T exchange(unsigned mask, T value, int line, Read read) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) fail("only whole-warp exchanges are emulated", line);
    std::memcpy(&exchange_[running_], &value, sizeof(T));
    sync_warp(line);
    const int first = running_ / kWarpSize * kWarpSize;
    const T result = read([&](int lane) {
      T handed_in;
      std::memcpy(&handed_in, &exchange_[first + lane], sizeof(T));
      return handed_in;
    });
    sync_warp(line);
    return result;
  }

  int lane() const { return running_ % kWarpSize; }

 private:
  static std::vector<std::unique_ptr<Fiber>>& pool() {
    static std::vector<std::unique_ptr<Fiber>> fibers;
    return fibers;
  }

  // Resumes every fiber of a warp that can go on; returns how many could.
  int run_warp(int warp, int& finished) {
    int resumed = 0;
    const int size = warps_[warp].size;
    for (int turn = 0; turn < size; ++turn) {
      const int thread = warp * kWarpSize + (descending ? size - 1 - turn : turn);
      const Fiber& fiber = *pool()[thread];
      if (fiber.finished || (fiber.waiting && fiber.waiting->generation == fiber.generation)) continue;
      resume(thread);
      ++resumed;
      finished += fiber.finished;
    }
    return resumed;
  }

  static void trampoline() {
    Block& block = *current();
    (*block.body_)();
    pool()[block.running_]->finished = true;
    _longjmp(block.scheduler_, 1);
  }

  // Only the first entry needs ucontext; afterwards _setjmp and _longjmp switch without system calls.
  void resume(int thread) {
    Fiber& fiber = *pool()[thread];
    running_ = thread;
    fiber.waiting = nullptr;
    (*enter_)(thread);
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::trampoline, 0);
    setcontext(&fiber.start);
  }

  Barrier& named(int barrier, int threads) {
    if (barrier <= 0 || barrier >= kNamedBarriers) fail("no such named barrier");
    Barrier& chosen = named_[barrier];
    if (chosen.arrived > 0 && chosen.size != threads) fail("a named barrier was told two numbers of threads");
    chosen.size = threads;
    return chosen;
  }

  // Whether the barrier is full with this thread.
  bool arrive(Barrier& barrier, int line) {
    if (barrier.arrived > 0 && barrier.line != line) fail("threads of one block wait at different barriers", line);
    barrier.line = line;
    if (++barrier.arrived < barrier.size) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    return true;
  }

  void wait(Barrier& barrier, int line) {
    Fiber& fiber = *pool()[running_];
    const int64_t generation = barrier.generation;
    if (arrive(barrier, line)) return;
    fiber.waiting = &barrier;
    fiber.generation = generation;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
  }

  int threads_ = 0;
  int running_ = 0;
  Barrier block_;
  Barrier named_[kNamedBarriers];
  std::vector<Barrier> warps_;
  std::vector<uint64_t> exchange_;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  const std::function<void(int)>* enter_ = nullptr;
};

// Runs every block of a grid; `shared` is the storage behind the kernel's dynamic shared memory.
inline void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, char* shared,
                     const std::function<void(unsigned block, unsigned thread)>& enter,
                     const std::function<void()>& body) {
  Block block(static_cast<int>(threads));
  for (unsigned b = 0; b < blocks; ++b) {
    std::memset(shared, kPoison, kHopperSharedLimit);
    block.run(body, [&](int thread) { enter(b, static_cast<unsigned>(thread)); });
    for (size_t i = shared_bytes; i < kHopperSharedLimit; ++i)
      if (static_cast<unsigned char>(shared[i]) != kPoison) fail("shared memory beyond its size was written");
  }
}

}  // namespace emulate

extern "C" __attribute__((used)) inline void set_descending(int descending) { emulate::descending = descending != 0; }
extern "C" __attribute__((used)) inline void set_capability(int capability) { emulate::capability = capability; }
