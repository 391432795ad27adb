// Device memory of exactly the requested size. Every access outside of it is noticed.
//
// load_global, store_global and the atomics look up each address. So they catch every access outside of buffers, and
// count the bytes of each buffer. A plain dereference behind the buffer faults on a page without access rights; with
// AddressSanitizer, the bytes right before and behind the buffer are poisoned. A plain write elsewhere is found
// afterwards by the bytes that it changed. New buffers hold 0xFF, which is NaN in every floating-point type.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bnfused::emulator {

struct Traffic {
  uint64_t wide = 0;    // bytes moved by accesses of 16 bytes
  uint64_t narrow = 0;  // bytes moved by smaller ones
};

class GuardedBuffer {
 public:
  // `name` appears in reports. The address is `phase` modulo 16, so that a misaligned view stays one.
  GuardedBuffer(std::string name, size_t bytes, size_t phase = 0);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  const std::string& name() const { return name_; }
  size_t bytes() const { return bytes_; }

  bool contains(const void* p, size_t bytes) const {
    const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(data_);
    return at >= begin && bytes <= bytes_ && at - begin <= bytes_ - bytes;
  }

  Traffic read, written;  // of the current or the last launch

 private:
  friend std::string damage_of_buffers();
  std::string damage() const;

  std::string name_;
  size_t bytes_, mapped_;
  char *mapping_, *data_;
};

// The buffer that holds all of [p, p + bytes), or nullptr.
GuardedBuffer* find_buffer(const void* p, size_t bytes);

// "byte 792 of 'x' (792 bytes)", for an address inside a buffer or near it; "" elsewhere.
void describe_address(const void* p, char* text, size_t text_bytes);

// Every live buffer.
const std::vector<GuardedBuffer*>& buffers();

// Which byte outside of a buffer was overwritten; "" if none was.
std::string damage_of_buffers();

}  // namespace bnfused::emulator
