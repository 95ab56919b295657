// attention_pool and the gate of gated_attention_pool.
#include "bindings_cpu.h"
#include "cpu/checks.h"
#include "cpu/gate.h"
#include "cpu/pool.h"

namespace py = pybind11;

namespace momkd {
namespace {

void attention_pool_of(const RowArguments &values, uintptr_t scores, uintptr_t offsets, int64_t bags,
                       int64_t heads, uintptr_t pooled, uintptr_t stats, int threads) {
  const Rows rows = rows_of(values);
  py::gil_scoped_release release;
  check_offsets(pointer<const int32_t>(offsets), bags, rows.n);
  attention_pool(rows, pointer<const float>(scores), pointer<const int32_t>(offsets), bags, heads,
                 pointer<float>(pooled), pointer<float>(stats), threads);
}

void attention_pool_backward_of(uintptr_t grad, const RowArguments &values, uintptr_t scores,
                                uintptr_t offsets, int64_t bags, int64_t heads, uintptr_t stats,
                                uintptr_t d_scores, uintptr_t d_values, int threads) {
  const Rows rows = rows_of(values);
  py::gil_scoped_release release;
  check_offsets(pointer<const int32_t>(offsets), bags, rows.n);
  attention_pool_backward(pointer<const float>(grad), rows, pointer<const float>(scores),
                          pointer<const int32_t>(offsets), bags, heads, pointer<const float>(stats),
                          pointer<float>(d_scores), pointer<void>(d_values), threads);
}

GateDropout dropout_of(int64_t seed, int64_t first_row, uint32_t threshold, float scale) {
  return {static_cast<uint64_t>(seed), first_row, threshold, scale};
}

void gate_scores_of(uintptr_t pre, int64_t rows, int64_t hidden, int64_t heads, bool gated, int64_t seed,
                    int64_t first_row, uint32_t threshold, float scale, uintptr_t w_a, uintptr_t b_a,
                    uintptr_t scores, int threads) {
  py::gil_scoped_release release;
  gate_scores(pointer<const float>(pre), {rows, hidden, heads, gated},
              dropout_of(seed, first_row, threshold, scale), pointer<const float>(w_a),
              pointer<const float>(b_a), pointer<float>(scores), threads);
}

void gate_backward_of(uintptr_t pre, int64_t rows, int64_t hidden, int64_t heads, bool gated, int64_t seed,
                      int64_t first_row, uint32_t threshold, float scale, uintptr_t w_a, uintptr_t d_scores,
                      uintptr_t d_w_a, uintptr_t d_bias, int threads) {
  py::gil_scoped_release release;
  gate_backward(pointer<float>(pre), {rows, hidden, heads, gated},
                dropout_of(seed, first_row, threshold, scale), pointer<const float>(w_a),
                pointer<const float>(d_scores), pointer<float>(d_w_a), pointer<float>(d_bias), threads);
}

}  // namespace

void bind_pool(py::module_ &m) {
  using py::arg;
  m.def("attention_pool", &attention_pool_of, arg("values"), arg("scores_ptr"), arg("offsets_ptr"),
        arg("bags"), arg("heads"), arg("pooled_ptr"), arg("stats_ptr"), arg("threads"));
  m.def("attention_pool_backward", &attention_pool_backward_of, arg("grad_ptr"), arg("values"),
        arg("scores_ptr"), arg("offsets_ptr"), arg("bags"), arg("heads"), arg("stats_ptr"),
        arg("d_scores_ptr"), arg("d_values_ptr"), arg("threads"));
  m.def("gate_scores", &gate_scores_of, arg("pre_ptr"), arg("rows"), arg("hidden"), arg("heads"),
        arg("gated"), arg("seed"), arg("first_row"), arg("threshold"), arg("scale"), arg("w_a_ptr"),
        arg("b_a_ptr"), arg("scores_ptr"), arg("threads"));
  m.def("gate_backward", &gate_backward_of, arg("pre_ptr"), arg("rows"), arg("hidden"), arg("heads"),
        arg("gated"), arg("seed"), arg("first_row"), arg("threshold"), arg("scale"), arg("w_a_ptr"),
        arg("d_scores_ptr"), arg("d_w_a_ptr"), arg("d_bias_ptr"), arg("threads"));
}

}  // namespace momkd
