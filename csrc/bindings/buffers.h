// Arguments: one-dimensional host buffers of integers, checked; lists as the slow way.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/types.h"

namespace pagedkv {

// An object's memory by the buffer protocol, until this ends. A view may point into itself, so that
// only where it was filled it can be read.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;

  const Py_buffer* fill(pybind11::handle object);  // null if the object gives none

 private:
  bool held_ = false;
  Py_buffer view_{};
};

// A checked view of a Python argument. Borrows the memory where its type is already right, else
// holds a converted copy. Lives as long as the call.
template <class T>
class Argument {
 public:
  // int64 and int32 buffers, or a sequence of int. Values of T must hold them all.
  Argument(const char* name, pybind11::handle object);
  // As above; None gives an absent argument.
  static Argument optional(const char* name, pybind11::handle object);

  bool given() const { return given_; }
  std::span<const T> span() const { return values_; }
  std::optional<std::span<const T>> value() const {  // none: absent
    return given_ ? std::optional(values_) : std::nullopt;
  }

 private:
  Argument() = default;
  void read_sequence(const char* name, pybind11::handle object);
  void read_buffer(const char* name, pybind11::handle object);
  // `size` native integers, of 8 bytes if `wide`, else of 4.
  void read_integers(const char* name, const void* data, std::size_t size, bool wide);

  bool given_ = false;
  pybind11::object array_;
  Buffer buffer_;
  std::vector<T> copy_;
  std::span<const T> values_;
};

extern template class Argument<std::int64_t>;
extern template class Argument<Token>;

// Ids have the memory of int64.
inline std::span<const SequenceId> as_ids(const Argument<std::int64_t>& argument) {
  static_assert(sizeof(SequenceId) == sizeof(std::int64_t));
  return {reinterpret_cast<const SequenceId*>(argument.span().data()), argument.span().size()};
}

// bytes, or str as UTF-8; None is none. The view lives as long as the object.
std::optional<std::string_view> salt_argument(pybind11::handle object);

// An int64, refusing bool and float.
std::int64_t int_argument(const char* name, pybind11::handle object);

}  // namespace pagedkv
