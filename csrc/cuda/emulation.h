// CUDA's threads on a CPU, for tests: each is a fibre, all blocks run one after the other in one operating-system
// thread. What a GPU leaves open is made as bad as it can be: each warp, and in it each lane, runs as far as it can
// before the next one starts, in an order that R1MEGA_EMULATION_SEED shuffles, and shared memory starts as garbage.
// A missing barrier gives wrong results under some order; a barrier that not all threads reach is an error. Not found:
// missing memory fences between blocks, bank conflicts, slowness.
//
// Fibres are started with ucontext and switched with setjmp and longjmp, which make no system call; so compile with
// -U_FORTIFY_SOURCE, whose longjmp refuses to change stacks.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;

namespace r1mega {
namespace emulation {

constexpr int kLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Warp;
// What a warp's collective gives to one lane, from the values that all lanes of the mask brought.
using Collective = uint64_t (*)(const Warp& warp, unsigned mask, int lane, uint64_t argument);

struct Fibre {
  State state = State::kReady;
  bool started = false;
  jmp_buf resume;
  ucontext_t context;
  unsigned mask = 0;
  Collective collective = nullptr;
  uint64_t value = 0, argument = 0, result = 0;
};

struct Warp {
  Fibre* lanes = nullptr;
  unsigned arrived = 0;

  uint64_t value(unsigned mask, uint64_t lane) const {
    if (lane >= kLanes || !(mask >> lane & 1)) throw std::runtime_error("a lane reads from one outside the mask");
    return lanes[lane].value;
  }
};

struct Block {
  void (*run)(const void* kernel);
  const void* kernel;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;  // exactly as large as the object, so that the address sanitizer sees its end
  size_t shared_bytes = 0;
  std::exception_ptr error;
  jmp_buf scheduler;
  unsigned running = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local dim3 thread_index, block_index, block_size, grid_size;
inline thread_local char last_error[128];

// The order of warps and lanes: as they are numbered for seed 0, otherwise shuffled again and again.
class Order {
 public:
  Order() {
    const char* text = std::getenv("R1MEGA_EMULATION_SEED");
    state_ = text ? std::strtoull(text, nullptr, 10) * 0x9e3779b97f4a7c15 : 0;
  }
  void shuffle(std::vector<unsigned>& numbers) {
    for (size_t i = numbers.size(); state_ && i > 1; --i) std::swap(numbers[i - 1], numbers[next() % i]);
  }

 private:
  uint64_t next() {  // xorshift
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  uint64_t state_;
};

inline std::vector<unsigned> numbers_below(size_t count) {
  std::vector<unsigned> numbers(count);
  for (size_t i = 0; i < count; ++i) numbers[i] = unsigned(i);
  return numbers;
}

inline void wait(State state) {
  Fibre& me = block->fibres[block->running];
  me.state = state;
  if (!_setjmp(me.resume)) _longjmp(block->scheduler, 1);
}

inline void run_fibre() {
  try {
    block->run(block->kernel);
  } catch (...) {
    block->error = std::current_exception();
  }
  block->fibres[block->running].state = State::kDone;
  _longjmp(block->scheduler, 1);
}

// The lane that arrives last computes the results of all.
inline uint64_t collective(unsigned mask, uint64_t value, Collective function, uint64_t argument = 0) {
  const unsigned thread = block->running, lane = thread % kLanes;
  Fibre& me = block->fibres[thread];
  Warp& warp = block->warps[thread / kLanes];
  if (!(mask >> lane & 1)) throw std::runtime_error("a lane is not in the mask of its own collective");
  me.mask = mask;
  me.value = value;
  me.collective = function;
  me.argument = argument;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) != mask) {
    wait(State::kAtWarpBarrier);
    return me.result;
  }
  for (int other = 0; other < kLanes; ++other) {
    if (!(mask >> other & 1)) continue;
    Fibre& fibre = warp.lanes[other];
    if (fibre.mask != mask || fibre.collective != function)
      throw std::runtime_error("the lanes of a warp are at different collectives");
    fibre.result = function(warp, mask, other, fibre.argument);
  }
  for (int other = 0; other < kLanes; ++other)
    if (mask >> other & 1) warp.lanes[other].state = State::kReady;
  warp.arrived &= ~mask;
  return me.result;
}

// Lets one fibre run until it waits or is done.
inline void resume(unsigned thread, char* stacks) {
  Fibre& fibre = block->fibres[thread];
  block->running = thread;
  thread_index = dim3(thread % block_size.x, thread / block_size.x % block_size.y);
  if (_setjmp(block->scheduler)) return;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = stacks + thread * kStackBytes;
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, run_fibre, 0);
  setcontext(&fibre.context);
}

// Runs the fibres of `block`, warp after warp, until none is left.
inline void run_block(char* stacks, Order& order) {
  const unsigned num_threads = unsigned(block->fibres.size());
  std::vector<unsigned> warps = numbers_below(block->warps.size()), lanes = numbers_below(kLanes);
  for (;;) {
    order.shuffle(warps);
    bool any = false;
    for (unsigned warp : warps) {
      for (bool again = true; again;) {
        again = false;
        order.shuffle(lanes);
        for (unsigned lane : lanes) {
          const unsigned thread = warp * kLanes + lane;
          if (thread >= num_threads || block->fibres[thread].state != State::kReady) continue;
          resume(thread, stacks);
          if (block->error) std::rethrow_exception(block->error);
          again = any = true;
        }
      }
    }
    if (any) continue;
    unsigned done = 0, waiting = 0;
    for (const Fibre& fibre : block->fibres) {
      done += fibre.state == State::kDone;
      waiting += fibre.state == State::kAtBlockBarrier;
    }
    if (done == num_threads) return;
    if (done + waiting != num_threads) throw std::runtime_error("lanes of a warp wait for lanes that do not come");
    for (Fibre& fibre : block->fibres)
      if (fibre.state == State::kAtBlockBarrier) fibre.state = State::kReady;
  }
}

template <class Kernel>
cudaError_t launch(dim3 grid, dim3 threads, Kernel kernel) {
  const unsigned num_threads = threads.x * threads.y * threads.z;
  if (!num_threads || num_threads > kMostThreads || !grid.x || !grid.y) return cudaErrorInvalidValue;
  static thread_local std::unique_ptr<char[]> stacks(new char[kMostThreads * kStackBytes]);
  Order order;
  block_size = threads;
  grid_size = grid;
  try {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block current;
        block = &current;
        block_index = dim3(x, y);
        current.run = [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); };
        current.kernel = &kernel;
        current.fibres = std::vector<Fibre>(num_threads);
        current.warps = std::vector<Warp>((num_threads + kLanes - 1) / kLanes);
        for (size_t warp = 0; warp < current.warps.size(); ++warp)
          current.warps[warp].lanes = &current.fibres[warp * kLanes];
        run_block(stacks.get(), order);
      }
    }
  } catch (const std::exception& error) {
    strncpy(last_error, error.what(), sizeof(last_error) - 1);
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class Fold>
uint64_t fold(const Warp& warp, unsigned mask, uint64_t start, Fold step) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) start = step(start, lane, warp.lanes[lane].value);
  return start;
}

}  // namespace emulation

template <class T>
T& shared_memory() {
  emulation::Block& block = *emulation::block;
  if (!block.shared) {
    block.shared.reset(new char[sizeof(T)]);
    block.shared_bytes = sizeof(T);
    memset(block.shared.get(), 0xcd, sizeof(T));
  }
  if (block.shared_bytes != sizeof(T)) throw std::runtime_error("a block has one object in shared memory");
  return *reinterpret_cast<T*>(block.shared.get());
}

inline float reciprocal_guess(float value) { return 1.f / value; }

}  // namespace r1mega

#define threadIdx r1mega::emulation::thread_index
#define blockIdx r1mega::emulation::block_index
#define blockDim r1mega::emulation::block_size
#define gridDim r1mega::emulation::grid_size
#define R1MEGA_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), r1mega::emulation::launch((grid), (block), [=] { (kernel)(__VA_ARGS__); }))

inline const char* cudaGetErrorString(cudaError_t) { return r1mega::emulation::last_error; }

inline void __syncthreads() { r1mega::emulation::wait(r1mega::emulation::State::kAtBlockBarrier); }

inline void __syncwarp(unsigned mask = ~0u) {
  r1mega::emulation::collective(
      mask, 0, [](const r1mega::emulation::Warp&, unsigned, int, uint64_t) -> uint64_t { return 0; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  using namespace r1mega::emulation;
  return from_bits<T>(collective(
      mask, bits_of(value),
      [](const Warp& warp, unsigned mask, int, uint64_t source) { return warp.value(mask, source % kLanes); }, source));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  using namespace r1mega::emulation;
  return from_bits<T>(collective(
      mask, bits_of(value),
      [](const Warp& warp, unsigned mask, int lane, uint64_t lanes) { return warp.value(mask, lane ^ lanes); }, lanes));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  using namespace r1mega::emulation;
  return from_bits<T>(collective(
      mask, bits_of(value),
      [](const Warp& warp, unsigned mask, int lane, uint64_t lanes) {
        return warp.value(mask, uint64_t(lane) >= lanes ? lane - lanes : lane);
      },
      lanes));
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  using namespace r1mega::emulation;
  return unsigned(collective(mask, predicate, [](const Warp& warp, unsigned mask, int, uint64_t) {
    return fold(warp, mask, 0, [](uint64_t all, int lane, uint64_t value) { return all | value << lane; });
  }));
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  using namespace r1mega::emulation;
  return unsigned(collective(mask, value, [](const Warp& warp, unsigned mask, int, uint64_t) {
    return fold(warp, mask, 0, [](uint64_t best, int, uint64_t value) { return best < value ? value : best; });
  }));
}

inline int __reduce_add_sync(unsigned mask, int value) {
  using namespace r1mega::emulation;
  return int(collective(mask, uint64_t(int64_t(value)), [](const Warp& warp, unsigned mask, int, uint64_t) {
    return fold(warp, mask, 0, [](uint64_t sum, int, uint64_t value) { return sum + value; });
  }));
}

inline unsigned atomicOr(unsigned* target, unsigned bits) {
  const unsigned before = *target;
  *target |= bits;
  return before;
}

inline float __uint_as_float(unsigned bits) { return r1mega::emulation::from_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return unsigned(r1mega::emulation::bits_of(value)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
