#include "buffers.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r1mega {
namespace {

constexpr size_t kPage = size_t(1) << 21;           // a huge page, where the system has them
constexpr size_t kMostWaiting = size_t(1) << 29;    // bytes; what comes back above it replaces what waited longest

struct Block {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::list<Block> waiting;  // longest first
  size_t bytes = 0;
};

// Never destroyed: tensors may outlive every other object.
Pool& pool() {
  static Pool* only = new Pool;
  return *only;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes), capacity_((bytes + kPage - 1) / kPage * kPage), data_(nullptr) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.waiting.end();
    for (auto block = p.waiting.begin(); block != p.waiting.end(); ++block) {
      const bool fits = block->capacity >= capacity_ && block->capacity - capacity_ <= capacity_ / 4;
      if (fits && (best == p.waiting.end() || block->capacity <= best->capacity)) best = block;
    }
    if (best != p.waiting.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      p.bytes -= best->capacity;
      p.waiting.erase(best);
      return;
    }
  }
  if (posix_memalign(&data_, kPage, capacity_)) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data_, capacity_, MADV_HUGEPAGE);  // a wish; small pages are right, too
#endif
}

Buffer::~Buffer() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (capacity_ > kMostWaiting) {
    free(data_);
    return;
  }
  p.waiting.push_back({data_, capacity_});
  p.bytes += capacity_;
  while (p.bytes > kMostWaiting) {
    free(p.waiting.front().data);
    p.bytes -= p.waiting.front().capacity;
    p.waiting.pop_front();
  }
}

size_t waiting_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

void release_waiting() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  for (const Block& block : pool().waiting) free(block.data);
  pool().waiting.clear();
  pool().bytes = 0;
}

}  // namespace r1mega
