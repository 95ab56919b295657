// memory_similarity, soft_angle_loss and memory_guided_pool.
#include <string>

#include "bindings_cpu.h"
#include "cpu/checks.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace momkd {
namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t>;

MemoryShape shape_of(const Shape &shape) {
  const auto [classes, slots, width] = shape;
  if (classes < 1 || slots < 1 || width < 1)
    throw py::value_error("shape: expected (C, K, S), each at least 1");
  return {classes, slots, width};
}

Rows columns_of(const RowArguments &z, const MemoryShape &shape) {
  const Rows rows = rows_of(z);
  if (rows.width != shape.width) throw py::value_error("z: expected as many columns as the memory");
  return rows;
}

void check_guided(const Rows &z, const Rows &values, const MemoryShape &shape, const GuidedBags &bags) {
  if (z.n != values.n) throw py::value_error("values: expected as many rows as z");
  if (shape.classes < 2 || (shape.classes > 2 && !bags.per_class))
    throw py::value_error("memory: expected 2 classes, or more with per_class, got " +
                          std::to_string(shape.classes) + (bags.per_class ? " with it" : " without"));
  check_offsets(bags.offsets, bags.bags, z.n);
}

SoftAngle angle_of(uintptr_t labels, float margin, float tau, float beta, int64_t n,
                   const MemoryShape &shape) {
  if (!(tau > 0)) throw py::value_error("tau: expected > 0");
  check_labels("labels", pointer<const int64_t>(labels), n, shape.classes);
  return {pointer<const int64_t>(labels), margin, tau, beta};
}

void similarity(const RowArguments &z, uintptr_t memory, const Shape &shape, float tau, uintptr_t value,
                uintptr_t nearest, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes);
  py::gil_scoped_release release;
  memory_similarity(rows, pointer<const float>(memory), sizes, tau, pointer<float>(value),
                    pointer<int32_t>(nearest), threads);
}

void similarity_backward(uintptr_t grad, const RowArguments &z, uintptr_t memory, const Shape &shape,
                         float tau, uintptr_t nearest, uintptr_t d_z, uintptr_t d_memory, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes);
  py::gil_scoped_release release;
  check_slots(pointer<const int32_t>(nearest), rows.n * sizes.classes, sizes.slots);
  memory_similarity_backward(pointer<const float>(grad), rows, pointer<const float>(memory), sizes, tau,
                             pointer<const int32_t>(nearest), pointer<void>(d_z), pointer<float>(d_memory),
                             threads);
}

void soft_angle(const RowArguments &z, uintptr_t memory, const Shape &shape, uintptr_t labels, float margin,
                float tau, float beta, uintptr_t losses, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes);
  const SoftAngle angle = angle_of(labels, margin, tau, beta, rows.n, sizes);
  py::gil_scoped_release release;
  soft_angle_loss(rows, pointer<const float>(memory), sizes, angle, pointer<float>(losses), threads);
}

void soft_angle_backward(uintptr_t grad, const RowArguments &z, uintptr_t memory, const Shape &shape,
                         uintptr_t labels, float margin, float tau, float beta, uintptr_t d_z,
                         uintptr_t d_memory, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes);
  const SoftAngle angle = angle_of(labels, margin, tau, beta, rows.n, sizes);
  py::gil_scoped_release release;
  soft_angle_loss_backward(pointer<const float>(grad), rows, pointer<const float>(memory), sizes, angle,
                           pointer<void>(d_z), pointer<float>(d_memory), threads);
}

void guided(const RowArguments &z, const RowArguments &values, uintptr_t memory, const Shape &shape,
            uintptr_t offsets, int64_t bags, bool per_class, float temperature, uintptr_t pooled,
            uintptr_t attention, uintptr_t nearest, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes), pooling = rows_of(values);
  const GuidedBags ragged{pointer<const int32_t>(offsets), bags, per_class, temperature};
  py::gil_scoped_release release;
  check_guided(rows, pooling, sizes, ragged);
  memory_guided_pool(rows, pooling, pointer<const float>(memory), sizes, ragged, pointer<float>(pooled),
                     pointer<float>(attention), pointer<int32_t>(nearest), threads);
}

void guided_backward(uintptr_t grad, const RowArguments &z, const RowArguments &values, uintptr_t memory,
                     const Shape &shape, uintptr_t offsets, int64_t bags, bool per_class, float temperature,
                     uintptr_t attention, uintptr_t nearest, uintptr_t d_z, uintptr_t d_values,
                     uintptr_t d_temperature, int threads) {
  const MemoryShape sizes = shape_of(shape);
  const Rows rows = columns_of(z, sizes), pooling = rows_of(values);
  const GuidedBags ragged{pointer<const int32_t>(offsets), bags, per_class, temperature};
  py::gil_scoped_release release;
  check_guided(rows, pooling, sizes, ragged);
  check_slots(pointer<const int32_t>(nearest), rows.n * sizes.classes, sizes.slots);
  memory_guided_pool_backward(pointer<const float>(grad), rows, pooling, pointer<const float>(memory), sizes,
                              ragged, pointer<const float>(attention), pointer<const int32_t>(nearest),
                              pointer<void>(d_z), pointer<void>(d_values), pointer<float>(d_temperature),
                              threads);
}

}  // namespace

void bind_memory(py::module_ &m) {
  using py::arg;
  m.def("memory_similarity", &similarity, arg("z"), arg("memory_ptr"), arg("shape"), arg("tau"),
        arg("value_ptr"), arg("nearest_ptr"), arg("threads"));
  m.def("memory_similarity_backward", &similarity_backward, arg("grad_ptr"), arg("z"), arg("memory_ptr"),
        arg("shape"), arg("tau"), arg("nearest_ptr"), arg("d_z_ptr"), arg("d_memory_ptr"), arg("threads"));
  m.def("soft_angle_loss", &soft_angle, arg("z"), arg("memory_ptr"), arg("shape"), arg("labels_ptr"),
        arg("margin"), arg("tau"), arg("beta"), arg("losses_ptr"), arg("threads"));
  m.def("soft_angle_loss_backward", &soft_angle_backward, arg("grad_ptr"), arg("z"), arg("memory_ptr"),
        arg("shape"), arg("labels_ptr"), arg("margin"), arg("tau"), arg("beta"), arg("d_z_ptr"),
        arg("d_memory_ptr"), arg("threads"));
  m.def("memory_guided_pool", &guided, arg("z"), arg("values"), arg("memory_ptr"), arg("shape"),
        arg("offsets_ptr"), arg("bags"), arg("per_class"), arg("temperature"), arg("pooled_ptr"),
        arg("attention_ptr"), arg("nearest_ptr"), arg("threads"));
  m.def("memory_guided_pool_backward", &guided_backward, arg("grad_ptr"), arg("z"), arg("values"),
        arg("memory_ptr"), arg("shape"), arg("offsets_ptr"), arg("bags"), arg("per_class"),
        arg("temperature"), arg("attention_ptr"), arg("nearest_ptr"), arg("d_z_ptr"), arg("d_values_ptr"),
        arg("d_temperature_ptr"), arg("threads"));
}

}  // namespace momkd
