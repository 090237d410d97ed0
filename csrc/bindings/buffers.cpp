#include "bindings/buffers.h"

#include <pybind11/numpy.h>

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

// Whether `data` can be read as integers of that size where it is.
bool is_aligned(const void* data, bool wide) {
  return reinterpret_cast<std::uintptr_t>(data) % (wide ? 8 : 4) == 0;
}

// Whether a numpy array is a row of native integers of 8 or 4 bytes.
bool is_plain(const py::array& array) {
  const py::dtype type = array.dtype();
  const py::ssize_t bytes = type.itemsize();
  return array.ndim() == 1 && type.kind() == 'i' && (bytes == 8 || bytes == 4) &&
         type.byteorder() == '=' && (array.shape(0) <= 1 || array.strides(0) == bytes);
}

}  // namespace

const Py_buffer* Buffer::fill(py::handle object) {
  held_ = PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDED_RO | PyBUF_FORMAT) == 0;
  if (!held_) PyErr_Clear();
  return held_ ? &view_ : nullptr;
}

Buffer::~Buffer() {
  if (held_) PyBuffer_Release(&view_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : held_(std::exchange(other.held_, false)), view_(other.view_) {}

template <class T>
Argument<T>::Argument(const char* name, py::handle object) : given_(true) {
  if (!PyObject_CheckBuffer(object.ptr())) {
    if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
      read_sequence(name, object);
      return;
    }
    if (!py::hasattr(object, "__array__")) refuse(name, "a " + type_name(object));
    try {
      array_ = object.attr("__array__")();
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // an interrupt, say
      refuse(name, "a " + type_name(object) + " that is not in host memory");
    }
    object = array_;
    if (!PyObject_CheckBuffer(object.ptr())) refuse(name, "a " + type_name(object));
  }
  // Most arguments are such arrays, and numpy takes longer to make a buffer of one than a step has.
  if (py::isinstance<py::array>(object)) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (is_plain(array)) {
      const auto size = static_cast<std::size_t>(array.shape(0));
      read_integers(name, array.data(), size, array.itemsize() == 8);
      array_ = array;
      return;
    }
  }
  read_buffer(name, object);
}

template <class T>
void Argument<T>::read_buffer(const char* name, py::handle object) {
  if (PyBytes_Check(object.ptr()) || PyByteArray_Check(object.ptr())) {
    refuse(name, "a " + type_name(object));
  }
  const Py_buffer* const filled = buffer_.fill(object);
  if (filled == nullptr) refuse(name, "a " + type_name(object) + " that gives no buffer");
  const Py_buffer& view = *filled;
  if (view.ndim != 1) refuse(name, "a buffer of " + std::to_string(view.ndim) + " dimensions");
  const char format = integer_format(view.format);
  const bool wide = (format == 'l' || format == 'q') && view.itemsize == 8;
  const bool narrow = (format == 'i' || format == 'l') && view.itemsize == 4;
  if (!wide && !narrow) {
    refuse(name, "a buffer of format '" + std::string(view.format ? view.format : "B") + "'");
  }
  const auto size = static_cast<std::size_t>(view.shape[0]);
  if (size > 1 && view.strides[0] != view.itemsize) refuse(name, "not contiguous");
  read_integers(name, view.buf, size, wide);
}

template <class T>
void Argument<T>::read_integers(const char* name, const void* data, std::size_t size, bool wide) {
  if constexpr (std::is_same_v<T, std::int64_t>) {
    if (wide && is_aligned(data, wide)) {
      values_ = {static_cast<const T*>(data), size};
      return;
    }
  }
  if constexpr (std::is_same_v<T, Token>) {
    if (!wide && is_aligned(data, wide)) {
      const auto* tokens = static_cast<const Token*>(data);
      Token bits = 0;
      for (std::size_t i = 0; i < size; ++i) bits |= tokens[i];
      if (bits >= 0) {
        values_ = {tokens, size};
        return;
      }
    }
  }
  copy_.resize(size);
  const bool fits = wide ? convert<std::int64_t>(data, size, copy_.data())
                         : convert<std::int32_t>(data, size, copy_.data());
  if (!fits) {
    wide ? refuse_token<std::int64_t>(name, data, size)
         : refuse_token<std::int32_t>(name, data, size);
  }
  values_ = copy_;
}

template <class T>
void Argument<T>::read_sequence(const char* name, py::handle object) {
  // Items are read by index each time: __index__ may be the user's, and change the list.
  const py::object items = py::reinterpret_borrow<py::object>(object);
  const auto size = [&] {
    const Py_ssize_t found = PySequence_Size(items.ptr());
    if (found < 0) throw py::error_already_set();
    return found;
  };
  for (Py_ssize_t i = 0; i < size(); ++i) {
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
