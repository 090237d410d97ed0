#include "bindings/buffers.h"

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/error.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void refuse(const char* name, const std::string& found) {
  throw InvalidSpec(std::string(name) + " is " + found +
                    ", expected a one-dimensional contiguous host buffer of int64 or int32");
}

// The letter of a native integer format: 'l', 'q', 'i'; 0 for anything else.
char integer_format(const char* format) {
  if (format == nullptr) return 0;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  return format[0] != 0 && format[1] == 0 ? format[0] : 0;
}

// Item i of a buffer, which may lie at any address.
template <class From>
From item(const void* buffer, std::size_t i) {
  From value;
  std::memcpy(&value, static_cast<const char*>(buffer) + i * sizeof(From), sizeof(From));
  return value;
}

// Copies `size` integers and says whether all of them are values of T; tokens may not be negative.
template <class From, class T>
bool convert(const void* from, std::size_t size, T* to) {
  if constexpr (std::is_same_v<T, Token>) {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const From value = item<From>(from, i);
      bits |= static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
      to[i] = static_cast<T>(value);
    }
    return bits <= static_cast<std::uint64_t>(std::numeric_limits<Token>::max());
  } else {
    for (std::size_t i = 0; i < size; ++i) to[i] = item<From>(from, i);
    return true;
  }
}

template <class From>
[[noreturn]] void refuse_token(const char* name, const void* from, std::size_t size) {
  std::size_t i = 0;
  while (i + 1 < size && item<From>(from, i) >= 0 &&
         std::int64_t{item<From>(from, i)} <= std::numeric_limits<Token>::max()) {
    ++i;
  }
  throw InvalidSpec(std::string(name) + "[" + std::to_string(i) + "] is " +
                    std::to_string(item<From>(from, i)) + ", expected a token id, 0 to 2147483647");
}

}  // namespace

template <class T>
Argument<T>::Argument(const char* name, py::handle object) : given_(true) {
  py::object array;  // what a tensor without the buffer protocol gives instead
  if (!PyObject_CheckBuffer(object.ptr())) {
    if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
      read_sequence(name, object);
      return;
    }
    if (!py::hasattr(object, "__array__")) refuse(name, "a " + type_name(object));
    try {
      array = object.attr("__array__")();
    } catch (py::error_already_set&) {
      refuse(name, "a " + type_name(object) + " that is not in host memory");
    }
    object = array;
    if (!PyObject_CheckBuffer(object.ptr())) refuse(name, "a " + type_name(object));
  }
  if (PyBytes_Check(object.ptr()) || PyByteArray_Check(object.ptr())) {
    refuse(name, "a " + type_name(object));
  }
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDED_RO | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    refuse(name, "a " + type_name(object) + " that gives no buffer");
  }
  held_ = true;
  const auto release_and_refuse = [&](const std::string& found) {
    PyBuffer_Release(&buffer_);
    held_ = false;
    refuse(name, found);
  };
  if (buffer_.ndim != 1) {
    release_and_refuse("a buffer of " + std::to_string(buffer_.ndim) + " dimensions");
  }
  const char format = integer_format(buffer_.format);
  const bool wide = (format == 'l' || format == 'q') && buffer_.itemsize == 8;
  const bool narrow = (format == 'i' || format == 'l') && buffer_.itemsize == 4;
  if (!wide && !narrow) {
    release_and_refuse("a buffer of format '" + std::string(buffer_.format ? buffer_.format : "B") +
                       "'");
  }
  const auto size = static_cast<std::size_t>(buffer_.shape[0]);
  if (size > 1 && buffer_.strides[0] != buffer_.itemsize) release_and_refuse("not contiguous");
  const bool aligned = reinterpret_cast<std::uintptr_t>(buffer_.buf) % (wide ? 8 : 4) == 0;
  if constexpr (std::is_same_v<T, std::int64_t>) {
    if (wide && aligned) {
      values_ = {static_cast<const T*>(buffer_.buf), size};
      return;
    }
  }
  if constexpr (std::is_same_v<T, Token>) {
    if (narrow && aligned) {
      const auto* tokens = static_cast<const Token*>(buffer_.buf);
      Token bits = 0;
      for (std::size_t i = 0; i < size; ++i) bits |= tokens[i];
      if (bits >= 0) {
        values_ = {tokens, size};
        return;
      }
    }
  }
  bool fits;
  try {
    copy_.resize(size);
  } catch (...) {
    PyBuffer_Release(&buffer_);
    throw;
  }
  fits = wide ? convert<std::int64_t>(buffer_.buf, size, copy_.data())
              : convert<std::int32_t>(buffer_.buf, size, copy_.data());
  if (!fits) {
    const Py_buffer buffer = buffer_;
    try {
      wide ? refuse_token<std::int64_t>(name, buffer.buf, size)
           : refuse_token<std::int32_t>(name, buffer.buf, size);
    } catch (...) {
      PyBuffer_Release(&buffer_);
      throw;
    }
  }
  values_ = copy_;
}

template <class T>
void Argument<T>::read_sequence(const char* name, py::handle object) {
  // Items are read by index each time: __index__ may be the user's, and change the list.
  const py::object items = py::reinterpret_borrow<py::object>(object);
  for (Py_ssize_t i = 0; i < PySequence_Size(items.ptr()); ++i) {
    const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(items.ptr(), i));
    if (!item) throw py::error_already_set();
    const std::string where = std::string(name) + "[" + std::to_string(i) + "]";
    const std::int64_t value = int_argument(where.c_str(), item);
    T converted{};
    if (!convert<std::int64_t>(&value, 1, &converted)) {
      throw InvalidSpec(where + " is " + std::to_string(value) +
                        ", expected a token id, 0 to 2147483647");
    }
    copy_.push_back(converted);
  }
  values_ = copy_;
}

template <class T>
Argument<T> Argument<T>::optional(const char* name, py::handle object) {
  return object.is_none() ? Argument() : Argument(name, object);
}

template <class T>
Argument<T>::~Argument() {
  if (held_) PyBuffer_Release(&buffer_);
}

template <class T>
Argument<T>::Argument(Argument&& other) noexcept
    : given_(other.given_),
      held_(std::exchange(other.held_, false)),
      buffer_(other.buffer_),
      copy_(std::move(other.copy_)),
      values_(other.values_) {}

template class Argument<std::int64_t>;
template class Argument<Token>;

std::optional<std::string_view> salt_argument(py::handle object) {
  if (object.is_none()) return std::nullopt;
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_Check(object.ptr())) {
    PyBytes_AsStringAndSize(object.ptr(), &data, &size);
    return std::string_view(data, static_cast<std::size_t>(size));
  }
  if (PyUnicode_Check(object.ptr())) {
    const char* text = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
    if (text != nullptr) return std::string_view(text, static_cast<std::size_t>(size));
    PyErr_Clear();
  }
  throw InvalidSpec("salt is a " + type_name(object) +
                    ", expected bytes or a str that UTF-8 holds");
}

namespace {

// Python's and numpy's; older numpys let theirs be an index.
bool is_bool(py::handle object) {
  return PyBool_Check(object.ptr()) || type_name(object).starts_with("numpy.bool");
}

}  // namespace

std::int64_t int_argument(const char* name, py::handle object) {
  const auto refuse_int = [&](const std::string& found) {
    throw InvalidSpec(std::string(name) + " is " + found + ", expected an int64");
  };
  if (!PyIndex_Check(object.ptr()) || is_bool(object)) {
    refuse_int("a " + type_name(object));
  }
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!integer) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    refuse_int("a " + type_name(object));
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) refuse_int("too large or too small");
  return value;
}

}  // namespace pagedkv
