#include "parallel.h"

#include <atomic>

namespace saerec {
namespace {
std::atomic<bool> serial{false};
}

void set_serial(bool value) { serial.store(value, std::memory_order_relaxed); }
bool is_serial() { return serial.load(std::memory_order_relaxed); }

}  // namespace saerec
