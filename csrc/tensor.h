// A torch.Tensor as a C++ argument, without linking to torch: through the table of C functions that DLPack lets a tensor type offer
// (`__dlpack_c_exchange_api__`). Unlike `__dlpack__()`, it takes nanoseconds, which counts when one token at a time is decoded.
// The structs below restate the parts of that stable ABI which are used: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

#include "kernels.h"

namespace shoal {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major_version, minor_version;
    void* previous;
    void *allocate, *to_managed, *from_managed;
    int (*view)(void* py_object, DLTensor* out);
    void* current_stream;
};

// Valid during the call that it is an argument of.
class Tensor {
  public:
    bool view(nanobind::handle object) {
        static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
        nanobind::object capsule = nanobind::getattr(object.type(), nanobind::handle(name), nanobind::none());
        auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (!api || api->major_version != 1 || api->view(object.ptr(), &tensor_)) {
            PyErr_Clear();
            return false;
        }
        const int32_t cpu = 1;
        return tensor_.device_type == cpu && tensor_.type_lanes == 1;
    }

    int dimensions() const { return tensor_.ndim; }
    int64_t size(int dimension) const { return tensor_.shape[dimension]; }
    int64_t numel() const {
        int64_t product = 1;
        for (int i = 0; i < tensor_.ndim; ++i) product *= tensor_.shape[i];
        return product;
    }

    Rows rows() const {
        float* data = floats(2);
        return {data, tensor_.strides[0]};
    }
    Heads heads() const {
        float* data = floats(4);
        return {data, tensor_.strides[0], tensor_.strides[1], tensor_.strides[2]};
    }
    // A tensor without gaps.
    float* flat_floats() const { return packed() ? floats(tensor_.ndim) : throw nanobind::value_error("a tensor is not contiguous"); }
    // Whole numbers that index `count` things, or are `also`.
    const int64_t* indices(int64_t count, std::optional<int64_t> also = {}) const {
        const uint8_t signed_integer = 0;
        if (tensor_.type_code != signed_integer || tensor_.type_bits != 64 || !packed())
            throw nanobind::type_error("indices must be a contiguous int64 tensor");
        auto* data = reinterpret_cast<const int64_t*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
        for (int64_t i = 0, n = numel(); i < n; ++i)
            if ((data[i] < 0 || data[i] >= count) && data[i] != also) throw nanobind::index_error("an index is out of range");
        return data;
    }

    bool is_float() const { return tensor_.type_code == 2 && tensor_.type_bits == 32; }
    bool is_half() const { return tensor_.type_code == 2 && tensor_.type_bits == 16; }
    bool is_bfloat() const { return tensor_.type_code == 4 && tensor_.type_bits == 16; }
    bool is_byte() const { return tensor_.type_code == 1 && tensor_.type_bits == 8; }
    // The first byte of a tensor without gaps, whatever its type.
    uint8_t* bytes() const {
        if (!packed()) throw nanobind::value_error("a tensor is not contiguous");
        return static_cast<uint8_t*>(tensor_.data) + tensor_.byte_offset;
    }
    int64_t* flat_longs() const {
        if (tensor_.type_code != 0 || tensor_.type_bits != 64) throw nanobind::type_error("a tensor is not int64");
        return reinterpret_cast<int64_t*>(bytes());
    }
    int16_t* flat_shorts() const {
        if (tensor_.type_code != 0 || tensor_.type_bits != 16) throw nanobind::type_error("a tensor is not int16");
        return reinterpret_cast<int16_t*>(bytes());
    }
    int32_t* flat_ints() const {
        if (tensor_.type_code != 0 || tensor_.type_bits != 32) throw nanobind::type_error("a tensor is not int32");
        return reinterpret_cast<int32_t*>(bytes());
    }

  private:
    DLTensor tensor_ = {};

    bool packed() const {
        int64_t expected = 1;
        for (int i = tensor_.ndim - 1; i >= 0; --i) {
            if (tensor_.shape[i] != 1 && tensor_.strides[i] != expected) return false;
            expected *= tensor_.shape[i];
        }
        return true;
    }
    float* floats(int dimensions) const {
        const uint8_t floating = 2;
        if (tensor_.type_code != floating || tensor_.type_bits != 32) throw nanobind::type_error("a tensor is not float32");
        if (tensor_.ndim != dimensions) throw nanobind::value_error("a tensor has the wrong number of dimensions");
        if (tensor_.shape[dimensions - 1] != 1 && tensor_.strides[dimensions - 1] != 1)
            throw nanobind::value_error("a tensor is not contiguous in its last dimension");
        return reinterpret_cast<float*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
    }
};

}  // namespace shoal

namespace nanobind::detail {
template <> struct type_caster<shoal::Tensor> {
    NB_TYPE_CASTER(shoal::Tensor, const_name("torch.Tensor"))
    bool from_python(handle object, uint32_t, cleanup_list*) noexcept {
        try {
            return value.view(object);
        } catch (...) {
            PyErr_Clear();
            return false;
        }
    }
};
}  // namespace nanobind::detail
