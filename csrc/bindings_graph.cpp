// graph_attention.
#include "bindings_cpu.h"
#include "cpu/checks.h"
#include "cpu/graph_attention.h"

namespace py = pybind11;

namespace momkd {
namespace {

// The six lists of momkd.graph.Edges, and the numbers of nodes and edges.
using GraphArguments =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

GraphLists lists_of(const GraphArguments &arguments) {
  const auto [offsets, sources, out_offsets, targets, position, order, nodes, edges] = arguments;
  if (nodes < 0 || edges < 0) throw py::value_error("graph: expected nodes >= 0 and edges >= 0");
  return {pointer<const int32_t>(offsets),
          pointer<const int32_t>(sources),
          pointer<const int32_t>(out_offsets),
          pointer<const int32_t>(targets),
          pointer<const int32_t>(position),
          pointer<const int32_t>(order),
          nodes,
          edges};
}

// x_l and x_r as rows, att, heads, slope.
using AttentionArguments = std::tuple<RowArguments, RowArguments, uintptr_t, int64_t, float>;

GraphRows graph_rows_of(const AttentionArguments &arguments, int64_t nodes) {
  const auto &[l, r, att, heads, slope] = arguments;
  const Rows left = rows_of(l), right = rows_of(r);
  if (left.type != right.type) throw py::value_error("x_l and x_r: expected one dtype");
  if (left.n != nodes || right.n != nodes)
    throw py::value_error("x_l and x_r: expected a row for each node of the graph");
  if (heads < 1 || left.width % heads || left.width != right.width)
    throw py::value_error("heads: expected to divide the width of x_l and x_r");
  return {left.data,    right.data, pointer<const float>(att), left.type, left.stride,
          right.stride, heads,      left.width / heads,        slope};
}

using DropoutArguments = std::tuple<int64_t, uint32_t, float>;

GraphDropout graph_dropout_of(const DropoutArguments &arguments) {
  const auto [seed, threshold, scale] = arguments;
  return {static_cast<uint64_t>(seed), threshold, scale};
}

void graph_attention_of(const GraphArguments &graph, const AttentionArguments &rows,
                        const DropoutArguments &dropout, uintptr_t out, uintptr_t scores, uintptr_t stats,
                        int threads) {
  const GraphLists lists = lists_of(graph);
  const GraphRows of = graph_rows_of(rows, lists.nodes);
  py::gil_scoped_release release;
  check_graph(lists);
  graph_attention(lists, of, graph_dropout_of(dropout), pointer<void>(out), pointer<float>(scores),
                  pointer<float>(stats), threads);
}

void graph_attention_backward_of(uintptr_t grad, const GraphArguments &graph, const AttentionArguments &rows,
                                 const DropoutArguments &dropout, uintptr_t scores, uintptr_t stats,
                                 uintptr_t d_l, uintptr_t d_r, uintptr_t d_att, int threads) {
  const GraphLists lists = lists_of(graph);
  const GraphRows of = graph_rows_of(rows, lists.nodes);
  py::gil_scoped_release release;
  check_graph(lists);
  check_transpose(lists);
  graph_attention_backward(pointer<const void>(grad), lists, of, graph_dropout_of(dropout),
                           pointer<const float>(scores), pointer<const float>(stats), pointer<void>(d_l),
                           pointer<void>(d_r), pointer<float>(d_att), threads);
}

}  // namespace

void bind_graph(py::module_ &m) {
  using py::arg;
  m.def("graph_attention", &graph_attention_of, arg("graph"), arg("rows"), arg("dropout"), arg("out_ptr"),
        arg("scores_ptr"), arg("stats_ptr"), arg("threads"));
  m.def("graph_attention_backward", &graph_attention_backward_of, arg("grad_ptr"), arg("graph"), arg("rows"),
        arg("dropout"), arg("scores_ptr"), arg("stats_ptr"), arg("d_l_ptr"), arg("d_r_ptr"), arg("d_att_ptr"),
        arg("threads"));
}

}  // namespace momkd
