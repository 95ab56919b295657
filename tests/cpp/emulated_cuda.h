// CUDA on the CPU, to see what kernels compute where there is no GPU. Each thread of a block is a coroutine
// that runs until it waits: at a barrier, or for its warp at a ballot or a shuffle. Warps must arrive whole
// and at the same kind of exchange. In which order threads and blocks run, and whether asynchronous copies
// happen at once or only when they are waited for, is the schedule: what a kernel computes must not depend on
// it.
#pragma once

#define MOMKD_EMULATED
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct float4 {
  float x, y, z, w;
} __align__(16);
struct uint2 {
  unsigned x, y;
} __align__(8);
struct uint4 {
  unsigned x, y, z, w;
} __align__(16);
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulated {

enum class Exchange { none, ballot, shuffle_up, shuffle_xor, warp_barrier };

struct Copy {
  void *to;
  const void *from;
  int bytes, group;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false, at_barrier = false;
  int waits_for = -1;  // the exchange of its warp, by number
  int groups = 0;      // of copies, that were ended
  std::vector<Copy> copies;
};

struct Warp {
  uint64_t given[32], taken[32];
  Exchange kind = Exchange::none;
  int arrived = 0, number = 0;
};

class Machine {
 public:
  std::string error;

  void run(const std::function<void()> &kernel, unsigned blocks, unsigned threads, unsigned schedule,
           const std::function<void()> &new_block) {
    schedule_ = schedule;
    random_.seed(schedule);
    kernel_ = kernel;
    for (unsigned block : order(blocks)) {
      new_block();
      blockIdx.x = block;
      run_block(threads);
      if (!error.empty()) return;
    }
  }

  void barrier() {
    threads_[current_].at_barrier = true;
    yield();
  }

  // What each lane gave; all 32 must come.
  const uint64_t *exchange(Exchange kind, uint64_t value) {
    Warp &warp = warps_[current_ / 32];
    if (warp.arrived > 0 && warp.kind != kind) fail("threads of a warp wait at different exchanges");
    warp.kind = kind;
    warp.given[current_ % 32] = value;
    if (++warp.arrived == 32) {
      std::copy_n(warp.given, 32, warp.taken);
      warp.arrived = 0;
      ++warp.number;
    } else {
      threads_[current_].waits_for = warp.number;
      yield();
    }
    return warp.taken;
  }

  unsigned lane() const { return current_ % 32; }

  void copy(void *to, const void *from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
      fail("an asynchronous copy is not aligned");
    const Copy made{to, from, bytes, threads_[current_].groups};
    if (schedule_ % 2) std::memcpy(to, from, static_cast<size_t>(bytes));
    threads_[current_].copies.push_back(made);
  }
  void end_of_group() { ++threads_[current_].groups; }
  void wait_for_copies(int but) {
    Thread &thread = threads_[current_];
    std::vector<Copy> later;
    for (const Copy &each : thread.copies)
      if (each.group >= thread.groups - but)
        later.push_back(each);
      else if (schedule_ % 2 == 0)
        std::memcpy(each.to, each.from, static_cast<size_t>(each.bytes));
    thread.copies.swap(later);
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  std::vector<unsigned> order(unsigned count) {
    std::vector<unsigned> found(count);
    std::iota(found.begin(), found.end(), 0u);
    if (schedule_ == 1) std::reverse(found.begin(), found.end());
    if (schedule_ > 1) std::shuffle(found.begin(), found.end(), random_);
    return found;
  }

  void run_block(unsigned count) {
    threads_.resize(count);
    warps_.assign((count + 31) / 32, Warp());
    for (unsigned i = 0; i < count; ++i) {
      Thread &thread = threads_[i];
      if (!thread.stack) thread.stack.reset(new char[kStack]);
      thread.done = thread.at_barrier = false;
      thread.waits_for = -1;
      thread.groups = 0;
      thread.copies.clear();
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    running_ = this;
    for (bool moved = true; moved && error.empty();) {
      moved = false;
      for (unsigned i : order(count)) {
        Thread &thread = threads_[i];
        const Warp &warp = warps_[i / 32];
        if (thread.done || thread.at_barrier || (thread.waits_for >= 0 && thread.waits_for == warp.number))
          continue;
        thread.waits_for = -1;
        current_ = i;
        threadIdx.x = i;
        moved = true;
        swapcontext(&scheduler_, &thread.context);
        if (!error.empty()) return;
      }
      const auto waits = [](const Thread &t) { return t.done || t.at_barrier; };
      if (!moved && std::all_of(threads_.begin(), threads_.end(), waits)) {
        for (Thread &thread : threads_) moved |= thread.at_barrier, thread.at_barrier = false;
      }
    }
    for (const Thread &thread : threads_) {
      if (!thread.done) error = "threads wait for ever: a barrier or an exchange that not all of them reach";
      if (!thread.copies.empty()) error = "a thread ends before its asynchronous copies";
    }
  }

  static void enter() {
    running_->kernel_();
    running_->threads_[running_->current_].done = true;
  }
  void yield() {
    Thread &thread = threads_[current_];
    swapcontext(&thread.context, &scheduler_);
  }
  void fail(const char *what) {
    error = what;
    yield();
  }

  static inline Machine *running_ = nullptr;
  std::function<void()> kernel_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  unsigned current_ = 0, schedule_ = 0;
  std::mt19937 random_;
};

inline Machine machine;

template <typename T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::machine.barrier(); }
inline void __syncwarp() { emulated::machine.exchange(emulated::Exchange::warp_barrier, 0); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t *votes = emulated::machine.exchange(emulated::Exchange::ballot, vote);
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(votes[i]) << i;
  return all;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  const unsigned lane = emulated::machine.lane();
  const uint64_t *all = emulated::machine.exchange(emulated::Exchange::shuffle_xor, emulated::packed(value));
  return emulated::unpacked<T>(all[(lane ^ static_cast<unsigned>(step)) % 32]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = static_cast<int>(emulated::machine.lane());
  const uint64_t *all = emulated::machine.exchange(emulated::Exchange::shuffle_up, emulated::packed(value));
  return lane >= step ? emulated::unpacked<T>(all[lane - step]) : value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline float __uint_as_float(unsigned bits) { return emulated::unpacked<float>(bits); }
inline float __int_as_float(int bits) { return emulated::unpacked<float>(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(emulated::packed(value)); }

namespace momkd {

inline void copy_16(void *to, const void *from) { emulated::machine.copy(to, from, 16); }
inline void copy_8(void *to, const void *from) { emulated::machine.copy(to, from, 8); }
inline void copy_4(void *to, const void *from) { emulated::machine.copy(to, from, 4); }
inline void end_of_group() { emulated::machine.end_of_group(); }
inline void wait_for_all() { emulated::machine.wait_for_copies(0); }
inline void wait_for_all_but_one() { emulated::machine.wait_for_copies(1); }

inline float half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}

}  // namespace momkd
