// What parallel loops share: a queue of tasks, and memory that a thread keeps.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace sparsekit {

constexpr int64_t kAlign = 16;  // floats in a cache line, and in the widest register

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class F>
void parallel(int64_t count, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, 1, f);
}

// Tasks [0, count): every thread has its share, the same in every layer, so that it finds in its caches what it wrote
// last, and takes from the others' when it is done, since cores that share clock, caches and memory with strangers are
// not equally fast. What a task computes must not depend on who runs it.
class Queue {
 public:
  // run: tasks that a thread takes at once; 0 lets the queue choose.
  explicit Queue(int64_t count, int64_t run = 0)
      : count_(count),
        threads_(std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()))),
        run_(run ? run : std::max<int64_t>(1, count / (8 * threads_))),
        shares_(threads_) {
    for (int64_t i = 0; i < threads_; ++i) shares_[i].taken = first_of(i);
  }

  // One thread's view of the queue: the task at hand, and, if it looks ahead, the one that it will have after it.
  class Worker {
   public:
    Worker(Queue& queue, int64_t thread, bool ahead = true) : queue_(queue), thread_(thread), ahead_(ahead) {
      if (ahead_) next_ = after();
      advance();
    }
    bool done() const { return task_ < 0; }
    int64_t task() const { return task_; }
    int64_t next() const { return next_; }
    void advance() {
      task_ = ahead_ ? next_ : after();
      if (ahead_ && task_ >= 0) next_ = after();
    }

   private:
    int64_t after() {
      if (at_ == end_) std::tie(at_, end_) = queue_.take(thread_);
      return at_ == end_ ? -1 : at_++;
    }

    Queue& queue_;
    const int64_t thread_;
    const bool ahead_;
    int64_t at_ = 0, end_ = 0, task_ = -1, next_ = -1;
  };

  // f(worker) on every thread.
  template <class F>
  void run(const F& f) {
    if (count_ == 0) return;
    parallel(threads_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Worker worker(*this, i);
        if (!worker.done()) f(worker);
      }
    });
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> taken;
  };

  int64_t first_of(int64_t thread) const { return count_ * thread / threads_; }

  // A run of tasks from a thread's own share, else from another's; empty at the end.
  std::pair<int64_t, int64_t> take(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (thread + i) % threads_, end = first_of(owner + 1);
      if (shares_[owner].taken.load(std::memory_order_relaxed) >= end) continue;
      const int64_t begin = shares_[owner].taken.fetch_add(run_, std::memory_order_relaxed);
      if (begin < end) return {begin, std::min(begin + run_, end)};
    }
    return {0, 0};
  }

  const int64_t count_, threads_, run_;
  std::vector<Share> shares_;
};

constexpr int64_t kStreamFloats = 3 << 20;  // of a tensor that is too large for the caches
constexpr uintptr_t kHugePage = 2 << 20;

// Fresh memory comes page by page, and a fault costs more than filling the page: ask for huge ones.
inline void use_huge_pages(float* data, int64_t floats) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + floats) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory in huge pages, not set to anything.
class HugeMemory {
 public:
  explicit HugeMemory(int64_t floats)
      : floats_(round_up(floats, kHugePage / sizeof(float))),
        data_(static_cast<float*>(std::aligned_alloc(kHugePage, floats_ * sizeof(float)))) {
    use_huge_pages(data_.get(), floats_);
  }

  float* data() const { return data_.get(); }
  int64_t floats() const { return floats_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  int64_t floats_;
  std::unique_ptr<float, Free> data_;
};

// What a thread needs while this object lives, out of memory that the thread keeps for whoever is next. Objects of a
// thread end in the reverse order of their beginning.
class Scratch {
 public:
  Scratch() : block_(mine().block), used_(mine().used) {}
  ~Scratch() { mine().block = block_, mine().used = used_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Begins with a cache line.
  float* get(int64_t floats) {
    Memory& memory = mine();
    floats = round_up(floats, kAlign) + kBehind;
    for (; memory.block < memory.blocks.size(); ++memory.block, memory.used = 0)
      if (memory.used + floats <= memory.blocks[memory.block].floats()) break;
    if (memory.block == memory.blocks.size()) memory.blocks.emplace_back(floats);
    memory.used += floats;
    return memory.blocks[memory.block].data() + memory.used - floats;
  }

 private:
  static constexpr int64_t kBehind = 64;  // floats that may be read behind what is asked for

  struct Memory {
    std::vector<HugeMemory> blocks;
    size_t block = 0;  // what comes before it is in use, as are floats [0, used) of it
    int64_t used = 0;
  };

  static Memory& mine() {
    thread_local Memory memory;
    return memory;
  }

  const size_t block_;
  const int64_t used_;
};

}  // namespace sparsekit
