// What the emulator reports about a launch: why it failed, where its threads are, how many bytes it moved.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>

#include "machine.h"

namespace bnfused::emulator {

std::string last_report;

namespace {

std::vector<LaunchRecord> launch_records;

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(machine.failure.data(), machine.failure.size(), format, arguments);
  va_end(arguments);
  if (current == &main_thread) {
    std::fprintf(stderr, "emulated device, outside a kernel: %s\n", machine.failure.data());
    std::abort();
  }
  Thread* from = current;
  current = &main_thread;
  switch_fiber(from->fiber, main_thread.fiber);
  std::abort();  // unreachable: nobody switches to a thread of a failed launch
}

std::string where_threads_are() {
  std::map<std::string, unsigned> counts;
  for (const auto& cluster : machine.live) {
    for (const Block* block : cluster->blocks) {
      for (const Thread& t : block->threads) {
        const std::string where = t.done ? "have exited"
                                  : t.waits_for
                                      ? std::string("wait in ") + t.waits_for + " at " + Place(t.waits_at).text
                                      : "can run";
        ++counts[where];
      }
    }
  }
  std::string text;
  for (const auto& [where, count] : counts) {
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " threads " + where;
  }
  return text;
}

std::string name_of_kernel(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel without a name";
  int status;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  name = name.substr(0, name.find_first_of("<("));
  name = name.substr(name.rfind(' ') + 1);  // the return type
  const size_t scope = name.rfind("::");
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

void record_launch(const void* kernel) {
  LaunchRecord record{name_of_kernel(kernel), machine.config, 0, machine.switches, {}};
  for (const SharedPlace& place : machine.shared_places) record.static_shared_bytes += place.bytes;
  for (const GuardedBuffer* buffer : buffers()) {
    const Traffic &read = buffer->read, &written = buffer->written;
    if (read.wide || read.narrow || written.wide || written.narrow) {
      record.buffers.push_back({buffer->name(), read, written});
    }
  }
  launch_records.push_back(std::move(record));
}

const std::vector<LaunchRecord>& launches() { return launch_records; }
void clear_launches() { launch_records.clear(); }
const std::string& report() { return last_report; }

}  // namespace bnfused::emulator
