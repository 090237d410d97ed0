// LayerWriter: writes of keys and values that are already what a layer keeps, with as little asked
// as decides. It is called for each layer of each step.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "bindings/dlpack.h"
#include "bindings/module.h"
#include "bindings/pools.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

// A type of tensors, and how to look at one of them; no type where its library does not say how.
struct Exchange {
  PyTypeObject* type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
};

Exchange exchange_of(py::handle tensor) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return {};
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  while (api != nullptr && api->major != dlpack::kMajorVersion) api = api->before;
  if (api == nullptr || api->look_at == nullptr) return {};
  return {Py_TYPE(tensor.ptr()), api};
}

std::uintptr_t address(const dlpack::Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
}

// Whether dimensions from `first` on lie dense behind each other. One of one element has any
// stride.
bool is_dense(const dlpack::Tensor& t, int first = 0) {
  if (t.strides == nullptr) return true;
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; i >= first; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

// A layer's keys or values, [N, P, H, D].
class Part {
 public:
  explicit Part(const dlpack::Tensor& t)
      : at_(address(t)), device_(t.device), dtype_(t.dtype), block_stride_(stride(t)) {
    for (std::size_t i = 0; i < 4; ++i) shape_[i] = t.shape[i];
  }

  std::int64_t token_bytes() const { return shape_[2] * shape_[3] * dtype_.bits / 8; }

  // Whether `t` is this tensor, or one just like it.
  bool is(const dlpack::Tensor& t) const {
    return address(t) == at_ && t.ndim == 4 && t.dtype == dtype_ && t.device == device_ &&
           std::equal(shape_.begin(), shape_.end(), t.shape) && stride(t) == block_stride_ &&
           is_dense(t, 1);
  }

  // Whether `t` is [num_tokens, H, D], dense, of the same type in the same place.
  bool takes(const dlpack::Tensor& t, std::int64_t num_tokens) const {
    return t.ndim == 3 && t.shape[0] == num_tokens && t.shape[1] == shape_[2] &&
           t.shape[2] == shape_[3] && t.dtype == dtype_ && t.device == device_ && is_dense(t);
  }

  const dlpack::Device& device() const { return device_; }

 private:
  static std::int64_t stride(const dlpack::Tensor& t) {
    return t.strides != nullptr ? t.strides[0] : t.shape[1] * t.shape[2] * t.shape[3];
  }

  std::uintptr_t at_;
  dlpack::Device device_;
  dlpack::DataType dtype_;
  std::int64_t block_stride_;
  std::array<std::int64_t, 4> shape_{};
};

class LayerWriter {
 public:
  LayerWriter(Pool& pool, std::size_t layer, const py::object& k, const py::object& v)
      : pool_(pool), layer_(layer), exchange_(exchange_of(k)) {
    dlpack::Tensor seen[2];
    if (!look_at(k, seen[0]) || !look_at(v, seen[1])) return;
    for (const dlpack::Tensor& t : seen) {
      if (t.ndim != 4 || !is_dense(t, 1) || t.dtype.lanes != 1 || t.dtype.bits % 8 != 0) return;
    }
    k_.emplace(seen[0]);
    v_.emplace(seen[1]);
  }

  bool write(std::uintptr_t slots, std::int64_t num_tokens, const py::object& k,
             const py::object& v) const {
    dlpack::Tensor seen[2];
    if (!k_ || !v_) return false;  // the pools themselves could not be looked at
    if (!look_at(k, seen[0]) || !k_->takes(seen[0], num_tokens)) return false;
    if (!look_at(v, seen[1]) || !v_->takes(seen[1], num_tokens)) return false;
    write_tokens(pool_, layer_, slots, static_cast<std::size_t>(num_tokens), address(seen[0]),
                 k_->token_bytes(), address(seen[1]), v_->token_bytes());
    return true;
  }

  bool write_into(const py::object& k_pool, const py::object& v_pool, const py::object& k,
                  const py::object& v, const py::object& slots) const {
    dlpack::Tensor seen;
    if (!k_ || !v_) return false;
    if (!look_at(k_pool, seen) || !k_->is(seen)) return false;
    if (!look_at(v_pool, seen) || !v_->is(seen)) return false;
    if (!look_at(slots, seen) || seen.ndim != 1 || seen.dtype != dlpack::kInt64 ||
        seen.device != k_->device() || !is_dense(seen)) {
      return false;
    }
    return write(address(seen), seen.shape[0], k, v);
  }

 private:
  // False where it is of another type, or one that its library does not let be looked at.
  bool look_at(py::handle object, dlpack::Tensor& out) const {
    if (Py_TYPE(object.ptr()) != exchange_.type) return false;
    if (exchange_.api->look_at(object.ptr(), &out) != 0) {
      PyErr_Clear();
      return false;
    }
    return out.data != nullptr;  // one that is empty, or has lost its memory, is for Python
  }

  Pool& pool_;
  std::size_t layer_;
  Exchange exchange_;
  std::optional<Part> k_, v_;
};

}  // namespace

void bind_layer_writer(py::module_& m) {
  py::class_<LayerWriter>(m, "LayerWriter", py::is_final(),
                          "Writes keys and values that are what a layer keeps.")
      .def(py::init<Pool&, std::size_t, const py::object&, const py::object&>(), py::arg("pool"),
           py::arg("layer"), py::arg("k"), py::arg("v"), py::keep_alive<1, 2>())
      .def("write", &LayerWriter::write, py::arg("slots"), py::arg("num_tokens"), py::arg("k"),
           py::arg("v"))
      .def("write_into", &LayerWriter::write_into, py::arg("k_pool"), py::arg("v_pool"),
           py::arg("k"), py::arg("v"), py::arg("slots"));
}

}  // namespace pagedkv
