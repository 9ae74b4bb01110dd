// Things that Python holds by a number.
//
// They may be used by several threads at once, and outlive their number while somebody still uses them. A registry must
// never be destroyed: Python may let go of things after static destructors have run.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace sparsekit {

template <class T>
class Registry {
 public:
  explicit Registry(const char* what) : what_(what) {}

  int64_t add(std::shared_ptr<T> thing) {
    const std::lock_guard lock(mutex_);
    things_.emplace(++last_, std::move(thing));
    return last_;
  }

  std::shared_ptr<T> at(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = things_.find(number);
    STD_TORCH_CHECK(found != things_.end(), "there is no ", what_, " ", number);
    return found->second;
  }

  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    things_.erase(number);
  }

 private:
  const char* const what_;
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> things_;
  int64_t last_ = 0;
};

}  // namespace sparsekit
