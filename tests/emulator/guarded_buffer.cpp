#include "guarded_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#include "sanitizers.h"

namespace bnfused::emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kFill = 0xff;

std::vector<GuardedBuffer*>& registry() {
  static std::vector<GuardedBuffer*> buffers;
  return buffers;
}

}  // namespace

GuardedBuffer::GuardedBuffer(std::string name, size_t bytes, size_t phase) : name_(std::move(name)), bytes_(bytes) {
  const size_t body = (bytes + 16 + kPage - 1) / kPage * kPage;
  mapped_ = body + 2 * kPage;
  void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kPage, PROT_NONE);
  mprotect(mapping_ + kPage + body, kPage, PROT_NONE);
  // The buffer ends as close to the guard page as the phase allows: at most 15 bytes lie between them.
  const size_t slack = (16 - (bytes + phase) % 16) % 16;
  data_ = mapping_ + kPage + body - slack - bytes;
  std::memset(mapping_ + kPage, kFill, body);
  asan_forbid(mapping_, mapped_);
  asan_allow(data_, bytes_);
  registry().push_back(this);
}

GuardedBuffer::~GuardedBuffer() {
  std::erase(registry(), this);
  asan_allow(mapping_, mapped_);
  munmap(mapping_, mapped_);
}

std::string GuardedBuffer::damage() const {
  const char *begin = mapping_ + kPage, *end = mapping_ + mapped_ - kPage;
  asan_allow(begin, static_cast<size_t>(end - begin));
  std::string found;
  for (const char* p = begin; p < end && found.empty(); p += p + 1 == data_ ? bytes_ + 1 : 1) {
    if (static_cast<unsigned char>(*p) != kFill) {
      found = "byte " + std::to_string(p - data_) + " of '" + name_ + "' (" + std::to_string(bytes_) +
              " bytes) was overwritten";
    }
  }
  asan_forbid(begin, static_cast<size_t>(data_ - begin));
  asan_forbid(data_ + bytes_, static_cast<size_t>(end - data_) - bytes_);
  return found;
}

const std::vector<GuardedBuffer*>& buffers() { return registry(); }

GuardedBuffer* find_buffer(const void* p, size_t bytes) {
  for (GuardedBuffer* buffer : registry()) {
    if (buffer->contains(p, bytes)) return buffer;
  }
  return nullptr;
}

void describe_address(const void* p, char* text, size_t text_bytes) {
  text[0] = 0;
  constexpr ptrdiff_t kNear = 2 * kPage;
  ptrdiff_t nearest = kNear;
  for (const GuardedBuffer* buffer : registry()) {
    const auto size = static_cast<ptrdiff_t>(buffer->bytes());
    const ptrdiff_t offset = static_cast<const char*>(p) - buffer->data<char>();
    const ptrdiff_t distance = std::max({ptrdiff_t{0}, -offset, offset - size});
    if (distance >= nearest) continue;
    nearest = distance;
    std::snprintf(text, text_bytes, "byte %td of '%s' (%td bytes)", offset, buffer->name().c_str(), size);
  }
}

std::string damage_of_buffers() {
  for (const GuardedBuffer* buffer : registry()) {
    std::string damage = buffer->damage();
    if (!damage.empty()) return damage;
  }
  return "";
}

}  // namespace bnfused::emulator
