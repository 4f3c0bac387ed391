// SPDX-License-Identifier: Apache-2.0
// The few standard helpers the kernels need, in their own namespace: templates of the standard library
// would be shared by the linker between instruction sets.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace vosops::VOSOPS_ISA {

// Uninitialised, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    const size_t bytes = (size_t(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  Buffer(int64_t size, T value) : Buffer(size) { fill(value); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}

inline void fill(float* data, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

}  // namespace vosops::VOSOPS_ISA
