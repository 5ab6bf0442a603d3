// Memory for large results that is used again.
//
// The C library gives blocks of 32 MiB and more back to the system each time, and the system clears and maps 4 KiB at a
// time when they are next written: that takes five times as long as writing the rows. A Buffer is one block, to which
// Python's buffer protocol gives access; when nothing refers to it any more, its memory waits for the next one.
#pragma once
#include <cstddef>

namespace r1mega {

class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, capacity_;
  void* data_;
};

// Bytes that wait to be used again; and giving them back to the system.
size_t waiting_bytes();
void release_waiting();

}  // namespace r1mega
