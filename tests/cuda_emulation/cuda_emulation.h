// SPDX-License-Identifier: Apache-2.0
// csrc/common/cuda_lanes.cuh on the host: a block's threads are fibers that switch at every collective. The
// next fiber is drawn at random, so that a missing barrier shows; lanes that do not meet at the same
// collective abort.
#pragma once
#include <ucontext.h>

#include <array>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define VOSOPS_DEVICE inline __attribute__((always_inline))
#define VOSOPS_ANYWHERE

namespace vosops::gpu {

struct Emulator {
  static constexpr int kStack = 256 * 1024;
  struct Fiber {
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
  };
  // Threads that meet: a warp, or the block. Two generations of what they bring, as a fast thread may
  // reach the next meeting before a slow one has read this one.
  struct Meeting {
    int arrived = 0, size = 0;
    uint64_t generation = 0;
    std::vector<std::array<uint64_t, 8>> brought[2];
    int kind[2] = {};
  };
  struct Copy {
    void* to;
    const void* from;  // null: zeros
  };
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::vector<Copy>>> copies;  // [thread][group], the last one open
  std::vector<Meeting> warps;
  Meeting block;
  int current = 0, x = 0, y = 0, z = 0;
  std::mt19937 random;
  ucontext_t main;
  std::function<void()> body;

  void yield() {
    if (_setjmp(fibers[current].at)) return;
    resume_another();
  }

  [[noreturn]] void resume_another() {
    const int n = int(fibers.size());
    // Mostly of the same warp: warps drift far apart, as nothing but a barrier may hold them together.
    const bool stay = random() % 1024 != 0;
    int next = stay ? current / 32 * 32 + int(random() % 32) : int(random() % n), looked = 0;
    while (fibers[next].done && looked++ < n) next = (next + 1) % n;
    if (fibers[next].done) setcontext(&main);
    current = next;
    if (fibers[next].started) _longjmp(fibers[next].at, 1);
    fibers[next].started = true;
    setcontext(&fibers[next].start);
    std::abort();
  }

  // Brings `words`, waits for all threads of the meeting, returns what each brought.
  const std::vector<std::array<uint64_t, 8>>& meet(Meeting& m, int index, int kind,
                                                   const std::array<uint64_t, 8>& words) {
    const int slot = m.generation % 2;
    if (m.arrived == 0) m.kind[slot] = kind;
    if (m.kind[slot] != kind) {
      std::fprintf(stderr, "divergent collective: thread %d at kind %d, others at %d\n", current, kind,
                   m.kind[slot]);
      std::abort();
    }
    m.brought[slot][index] = words;
    const uint64_t generation = m.generation;
    if (++m.arrived == m.size) {
      m.arrived = 0;
      ++m.generation;
    }
    while (m.generation == generation) yield();
    return m.brought[slot];
  }

  static Emulator*& active() {
    static Emulator* emulator = nullptr;
    return emulator;
  }
  static void enter() {
    active()->body();
    active()->fibers[active()->current].done = true;
    active()->resume_another();
  }

  void run(int threads, int bx, int by, int bz, std::function<void()> f) {
    active() = this;
    x = bx, y = by, z = bz, body = std::move(f);
    fibers.resize(threads);
    warps.assign(threads / 32, {});
    copies.assign(threads, {{}});
    for (auto& w : warps) {
      w.size = 32;
      for (auto& b : w.brought) b.resize(32);
    }
    block = {};
    block.size = threads;
    for (auto& b : block.brought) b.resize(threads);
    for (auto& f : fibers) {
      if (!f.stack) f.stack.reset(new char[kStack]);
      f.started = f.done = false;
      getcontext(&f.start);
      f.start.uc_stack = {f.stack.get(), 0, kStack};
      f.start.uc_link = nullptr;
      makecontext(&f.start, &Emulator::enter, 0);
    }
    volatile bool returned = false;
    getcontext(&main);
    if (!returned) {
      returned = true;
      resume_another();
    }
  }
};

inline Emulator& emulator() { return *Emulator::active(); }

// Not inlined: a fiber's index must be read again after every switch.
__attribute__((noinline)) inline int thread_index() { return emulator().current; }
inline int block_x() { return emulator().x; }
inline int block_y() { return emulator().y; }
inline int block_z() { return emulator().z; }

enum Kind : int {
  kSyncWarp = 1,
  kBallot,
  kShuffle,
  kReduce,
  kMatrices,
  kTransposed,
  kMultiply,
  kSyncBlock,
  kAnyOfBlock
};

inline const std::vector<std::array<uint64_t, 8>>& meet_warp(Kind kind,
                                                             const std::array<uint64_t, 8>& words) {
  Emulator& e = emulator();
  return e.meet(e.warps[e.current / 32], e.current % 32, kind, words);
}
inline void sync_block() { emulator().meet(emulator().block, emulator().current, kSyncBlock, {}); }
inline bool any_of_block(bool p) {
  bool found = false;
  for (const auto& words : emulator().meet(emulator().block, emulator().current, kAnyOfBlock, {p}))
    found |= words[0] != 0;
  return found;
}
inline void sync_warp() { meet_warp(kSyncWarp, {}); }
inline uint32_t ballot(bool p) {
  const auto& all = meet_warp(kBallot, {p});
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t(all[i][0] != 0) << i;
  return bits;
}
inline bool any(bool p) { return ballot(p) != 0; }
template <class V>
V shuffle(V value, int from) {
  std::array<uint64_t, 8> words = {};
  std::memcpy(words.data(), &value, sizeof value);
  const auto& all = meet_warp(kShuffle, words);
  std::memcpy(&value, all[from & 31].data(), sizeof value);
  return value;
}
template <class V>
V shuffle_xor(V value, int mask) {
  return shuffle(value, (thread_index() & 31) ^ mask);
}
inline uint32_t largest_of_warp(uint32_t x) {
  uint32_t out = 0;
  for (const auto& words : meet_warp(kReduce, {x})) out = words[0] > out ? uint32_t(words[0]) : out;
  return out;
}
inline uint32_t least_of_warp(uint32_t x) { return ~largest_of_warp(~x); }

inline void raise_to(uint32_t* to, uint32_t x) { *to = x > *to ? x : *to; }

inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (selector >> (4 * i) & 7) * 8 & 255) << (8 * i);
  return out;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float largest(float a, float b) { return a != a || b != b ? float_of(0x7fffffff) : a > b ? a : b; }

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  const int l = thread_index() & 31;
  const auto& all = meet_warp(kMatrices, {reinterpret_cast<uint64_t>(row)});
  for (int i = 0; i < 4; ++i)
    std::memcpy(&out[i], reinterpret_cast<const char*>(all[i * 8 + l / 4][0]) + l % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  const int l = thread_index() & 31;
  const auto& all = meet_warp(kTransposed, {reinterpret_cast<uint64_t>(row)});
  for (int i = 0; i < 4; ++i) {
    out[i] = 0;
    for (int j = 0; j < 2; ++j)
      out[i] |= uint32_t(reinterpret_cast<const uint16_t*>(all[i * 8 + l % 4 * 2 + j][0])[l / 4]) << (16 * j);
  }
}

// Nothing is copied before it is awaited, so that a missing await shows.
inline void start_copy(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  emulator().copies[thread_index()].back().push_back({to, inside ? from : nullptr});
}
inline void commit_copies() { emulator().copies[thread_index()].emplace_back(); }
template <int kLeft>
void await_copies() {
  auto& groups = emulator().copies[thread_index()];
  while (groups.size() > kLeft + 1) {
    for (const auto& copy : groups.front())
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    groups.erase(groups.begin());
  }
}

// Fragments as the PTX ISA lays them out for mma.m16n8k16.
template <class T>
void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int l = thread_index() & 31;
  const auto& all = meet_warp(kMultiply, {a[0], a[1], a[2], a[3], b0, b1});
  const auto value = [](uint64_t w, int half) {
    const auto pair = T::unpack(uint32_t(w));
    return half ? pair.second : pair.first;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k)
      sum += value(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
             value(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    c[i] = sum;
  }
}

}  // namespace vosops::gpu
