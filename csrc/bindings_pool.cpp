// attention_pool and the gate of gated_attention_pool.
#include <memory>

#include "bindings_cpu.h"
#include "cpu/amx.h"
#include "cpu/checks.h"
#include "cpu/gate.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
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

// Softmax pooling of rows whose scores come block by block. The caller keeps the tensors alive.
class PoolByBlocks {
 public:
  PoolByBlocks(const RowArguments &values, uintptr_t offsets, int64_t bags, int64_t heads, int threads)
      : values_(rows_of(values)), heads_(heads), threads_(threads) {
    check_offsets(pointer<const int32_t>(offsets), bags, values_.n);
    pieces_ = std::make_unique<BagPieces>(pointer<const int32_t>(offsets), bags);
    const int64_t tasks = static_cast<int64_t>(pieces_->pieces.size());
    partial_ = std::make_unique<PartialPools>(*pieces_, values_, heads, workers_for(tasks, threads));
  }

  // The pieces that end at or before row `end`, and were not pooled yet; scores (N, H) are right up to there.
  void pool(uintptr_t scores, int64_t end) {
    py::gil_scoped_release release;
    const int64_t first = next_, pieces = static_cast<int64_t>(pieces_->pieces.size());
    while (next_ < pieces && pieces_->pieces[static_cast<size_t>(next_)].last <= end) ++next_;
    parallel_for(next_ - first, workers_for(next_ - first, threads_), [&](int64_t task, int worker) {
      const int64_t number = first + task;
      partial_->piece(
          number, pointer<const float>(scores) + pieces_->pieces[static_cast<size_t>(number)].first * heads_,
          worker);
    });
  }

  void finish(uintptr_t pooled, uintptr_t stats) const {
    py::gil_scoped_release release;
    partial_->combine(pointer<float>(pooled), pointer<float>(stats), threads_);
  }

  PartialPools *pieces() const { return partial_.get(); }

 private:
  Rows values_;
  int64_t heads_, next_ = 0;
  int threads_;
  std::unique_ptr<BagPieces> pieces_;
  std::unique_ptr<PartialPools> partial_;
};

// rows, hidden, heads, gated; seed, first row, threshold, scale of dropout; the types of the features and of
// the products, as momkd.native.DTYPES numbers them; addresses of bias, w_a and b_a.
using GateArguments =
    std::tuple<std::tuple<int64_t, int64_t, int64_t, bool>, std::tuple<int64_t, int64_t, uint32_t, float>,
               std::tuple<int, int>, std::tuple<uintptr_t, uintptr_t, uintptr_t>>;

struct GateCall {
  GateShape shape;
  GateDropout dropout;
  GateTypes types;
  GateWeights weights;

  explicit GateCall(const GateArguments &arguments) {
    const auto [rows, hidden, heads, gated] = std::get<0>(arguments);
    const auto [seed, first_row, threshold, scale] = std::get<1>(arguments);
    const auto [features, products] = std::get<2>(arguments);
    const auto [bias, w_a, b_a] = std::get<3>(arguments);
    shape = {rows, hidden, heads, gated};
    dropout = {static_cast<uint64_t>(seed), first_row, threshold, scale};
    types = {row_type(features), row_type(products)};
    weights = {pointer<const float>(bias), pointer<const float>(w_a), pointer<const float>(b_a)};
    if (types.products != types.features && types.products != RowType::float32)
      throw py::value_error("products: expected the type of the features, or float32");
  }
};

void gate_scores_of(uintptr_t products, const GateArguments &arguments, uintptr_t scores, uintptr_t kept,
                    int threads) {
  const GateCall gate(arguments);
  py::gil_scoped_release release;
  gate_scores(pointer<const void>(products), gate.types, gate.shape, gate.dropout, gate.weights,
              pointer<float>(scores), pointer<void>(kept), threads);
}

void gate_backward_of(uintptr_t kept, const GateArguments &arguments, uintptr_t d_scores, uintptr_t d_rows,
                      uintptr_t d_columns, uintptr_t d_w_a, uintptr_t d_bias, int threads) {
  const GateCall gate(arguments);
  py::gil_scoped_release release;
  gate_backward(pointer<const void>(kept), gate.types, gate.shape, gate.dropout, gate.weights,
                pointer<const float>(d_scores), pointer<void>(d_rows), pointer<void>(d_columns),
                pointer<float>(d_w_a), pointer<float>(d_bias), threads);
}

#ifdef MOMKD_HAVE_AMX

int64_t amx_packed_size_of(int64_t columns, int64_t width) {
  return has_amx() && amx_takes(columns) ? amx_packed_size(columns, width) : 0;
}

void amx_pack_of(uintptr_t weights, int64_t columns, int64_t width, uintptr_t packed) {
  py::gil_scoped_release release;
  amx_pack(pointer<const uint16_t>(weights), columns, width, pointer<uint16_t>(packed));
}

void gate_scores_amx_of(const RowArguments &rows, uintptr_t packed, const GateArguments &arguments,
                        uintptr_t score_bias, uintptr_t scores, uintptr_t kept, const PoolByBlocks *pool,
                        int threads) {
  const GateCall gate(arguments);
  const Rows features = rows_of(rows);
  if (features.type != RowType::bfloat16 || features.n != gate.shape.rows || !has_amx())
    throw py::value_error("rows: expected bfloat16, as many as the gate has, and a processor with AMX");
  py::gil_scoped_release release;
  gate_scores_amx(features, pointer<const uint16_t>(packed), gate.shape, gate.dropout, gate.weights,
                  pointer<const float>(score_bias), pointer<float>(scores), pointer<void>(kept),
                  pool ? pool->pieces() : nullptr, threads);
}

#else

int64_t amx_packed_size_of(int64_t, int64_t) { return 0; }

#endif

}  // namespace

void bind_pool(py::module_ &m) {
  using py::arg;
  m.def("attention_pool", &attention_pool_of, arg("values"), arg("scores_ptr"), arg("offsets_ptr"),
        arg("bags"), arg("heads"), arg("pooled_ptr"), arg("stats_ptr"), arg("threads"));
  m.def("attention_pool_backward", &attention_pool_backward_of, arg("grad_ptr"), arg("values"),
        arg("scores_ptr"), arg("offsets_ptr"), arg("bags"), arg("heads"), arg("stats_ptr"),
        arg("d_scores_ptr"), arg("d_values_ptr"), arg("threads"));
  m.def("gate_scores", &gate_scores_of, arg("products_ptr"), arg("gate"), arg("scores_ptr"), arg("kept_ptr"),
        arg("threads"));
  m.def("gate_backward", &gate_backward_of, arg("kept_ptr"), arg("gate"), arg("d_scores_ptr"),
        arg("d_rows_ptr"), arg("d_columns_ptr"), arg("d_w_a_ptr"), arg("d_bias_ptr"), arg("threads"));
  py::class_<PoolByBlocks>(m, "PoolByBlocks")
      .def(py::init<const RowArguments &, uintptr_t, int64_t, int64_t, int>(), arg("values"),
           arg("offsets_ptr"), arg("bags"), arg("heads"), arg("threads"))
      .def("pool", &PoolByBlocks::pool, arg("scores_ptr"), arg("end"))
      .def("finish", &PoolByBlocks::finish, arg("pooled_ptr"), arg("stats_ptr"));
  // 0 where the matrix unit is missing or doesn't take so many columns.
  m.def("amx_packed_size", &amx_packed_size_of, arg("columns"), arg("width"));
#ifdef MOMKD_HAVE_AMX
  m.def("amx_pack", &amx_pack_of, arg("weights_ptr"), arg("columns"), arg("width"), arg("packed_ptr"));
  m.def("gate_scores_amx", &gate_scores_amx_of, arg("rows"), arg("packed_ptr"), arg("gate"),
        arg("score_bias_ptr"), arg("scores_ptr"), arg("kept_ptr"), arg("pool").none(true), arg("threads"));
#endif
}

}  // namespace momkd
