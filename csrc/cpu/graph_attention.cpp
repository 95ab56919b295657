#include "cpu/graph_attention.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/graph_attention_rows.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace momkd {
namespace {

constexpr int64_t kNodes = 64;  // of a block

int64_t blocks_of(const GraphLists &graph) { return (graph.nodes + kNodes - 1) / kNodes; }

int64_t place_of(const int32_t *offsets, int64_t node) { return offsets[node] + node; }

// Row i of rows of `stride` elements each; null stays null.
template <typename Data>
Data *row_at(Data *rows, RowType type, int64_t stride, int64_t i) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  return rows ? static_cast<Byte *>(rows) + i * stride * item_size(type) : nullptr;
}

// Pairs of the node that has the most, itself counted.
int64_t most_pairs(const int32_t *offsets, int64_t nodes) {
  int64_t most = 0;
  for (int64_t i = 0; i < nodes; ++i) most = std::max<int64_t>(most, offsets[i + 1] - offsets[i]);
  return most + 1;
}

// run(node, worker, block) for every node of a graph, block by block.
template <typename Run>
void over_nodes(const GraphLists &graph, int workers, const Run &run) {
  parallel_for(blocks_of(graph), workers, [&](int64_t block, int worker) {
    const int64_t last = std::min(graph.nodes, (block + 1) * kNodes);
    for (int64_t n = block * kNodes; n < last; ++n) run(graph.order[n], worker, block);
  });
}

// Memory of each worker for the pairs of a node.
class Pairs {
 public:
  Pairs(const GraphLists &graph, const GraphRows &rows, const GraphDropout &dropout, int workers)
      : graph_(graph),
        rows_(rows),
        dropout_(dropout),
        most_(most_pairs(graph.offsets, graph.nodes)),
        others_(workers * most_),
        weights_(workers * most_ * rows.heads) {}

  GraphNode node(int64_t i, int worker) const {
    const int64_t first = graph_.offsets[i], last = graph_.offsets[i + 1];
    const void **others = others_.get() + worker * most_;
    const auto row = [&](int64_t node) { return row_at(rows_.l, rows_.type, rows_.l_stride, node); };
    for (int64_t e = first; e < last; ++e) others[e - first] = row(graph_.sources[e]);
    others[last - first] = row(i);
    const GraphNode node{last - first + 1, first + i, others, weights_.get() + worker * most_ * rows_.heads};
    if (dropout_.threshold)
      MOMKD_KERNELS(graph_rows).keep(dropout_, node.place, node.count, rows_.heads, node.weights);
    return node;
  }

 private:
  const GraphLists &graph_;
  const GraphRows &rows_;
  const GraphDropout &dropout_;
  const int64_t most_;
  Buffer<const void *> others_;
  Buffer<float> weights_;
};

void backward_by_source(const void *grad, const GraphLists &graph, const GraphRows &rows, const float *pairs,
                        void *d_l, int threads) {
  const auto heard_backward = MOMKD_KERNELS(graph_rows).heard_backward[static_cast<int>(rows.type)];
  const int64_t columns = rows.heads * rows.width, most = most_pairs(graph.out_offsets, graph.nodes);
  const int workers = workers_for(blocks_of(graph), threads);
  const Buffer<const void *> pointers(workers * most * 2);
  const Buffer<const float *> pair_pointers(workers * most);
  over_nodes(graph, workers, [&](int64_t j, int worker, int64_t) {
    const void **r = pointers.get() + worker * most * 2, **g = r + most;
    const float **pair = pair_pointers.get() + worker * most;
    const int64_t first = graph.out_offsets[j], last = graph.out_offsets[j + 1];
    const auto set = [&](int64_t e, int64_t target, int64_t place) {
      r[e] = row_at(rows.r, rows.type, rows.r_stride, target);
      g[e] = row_at(grad, rows.type, columns, target);
      pair[e] = pairs + place * rows.heads * 2;
    };
    for (int64_t e = first; e < last; ++e)
      set(e - first, graph.targets[e], int64_t{graph.position[e]} + graph.targets[e]);
    set(last - first, j, place_of(graph.offsets, j + 1) - 1);
    heard_backward(rows, row_at(rows.l, rows.type, rows.l_stride, j), {last - first + 1, r, g, pair},
                   row_at(d_l, rows.type, columns, j));
  });
}

}  // namespace

void graph_attention(const GraphLists &graph, const GraphRows &rows, const GraphDropout &dropout, void *out,
                     float *scores, float *stats, int threads) {
  const auto hear = MOMKD_KERNELS(graph_rows).hear[static_cast<int>(rows.type)];
  const int64_t heads = rows.heads, columns = heads * rows.width;
  const int workers = workers_for(blocks_of(graph), threads);
  const Pairs pairs(graph, rows, dropout, workers);
  over_nodes(graph, workers, [&](int64_t i, int worker, int64_t) {
    const GraphNode node = pairs.node(i, worker);
    hear(rows, row_at(rows.r, rows.type, rows.r_stride, i), node, dropout.threshold > 0,
         row_at(out, rows.type, columns, i), scores + node.place * heads, stats + i * heads * 2);
  });
}

void graph_attention_backward(const void *grad, const GraphLists &graph, const GraphRows &rows,
                              const GraphDropout &dropout, const float *scores, const float *stats, void *d_l,
                              void *d_r, float *d_att, int threads) {
  const auto hear_backward = MOMKD_KERNELS(graph_rows).hear_backward[static_cast<int>(rows.type)];
  const int64_t heads = rows.heads, columns = heads * rows.width, blocks = blocks_of(graph);
  const int workers = workers_for(blocks, threads);
  const Buffer<float> pair(place_of(graph.offsets, graph.nodes) * heads * 2);
  const Buffer<float> parts(d_att ? blocks * columns : 0);
  std::fill_n(parts.get(), d_att ? blocks * columns : 0, 0.0f);
  {
    const Pairs pairs(graph, rows, dropout, workers);
    over_nodes(graph, workers, [&](int64_t i, int worker, int64_t block) {
      const GraphNode node = pairs.node(i, worker);
      hear_backward(rows, row_at(rows.r, rows.type, rows.r_stride, i), node, dropout.threshold > 0,
                    row_at(grad, rows.type, columns, i), scores + node.place * heads, stats + i * heads * 2,
                    pair.get() + node.place * heads * 2, row_at(d_r, rows.type, columns, i),
                    d_att ? parts.get() + block * columns : nullptr);
    });
  }
  if (d_l) backward_by_source(grad, graph, rows, pair.get(), d_l, threads);
  if (d_att) {
    std::vector<double> total(static_cast<size_t>(columns));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t c = 0; c < columns; ++c) total[static_cast<size_t>(c)] += parts[block * columns + c];
    std::copy(total.begin(), total.end(), d_att);
  }
}

}  // namespace momkd
