// Message passing of GATv2 over the in-neighbours of every node and itself, for rows of any type.
//
//   e_ij = a_h · LeakyReLU(l_j + r_i),  α_ij = softmax over j,  out_i = Σ_j drop(α_ij) l_j, for every head
//
// The place of a pair: those of node i stand at offsets[i] + i to offsets[i + 1] + i, in the order of its
// list, and itself last. Work is cut into blocks of nodes by their number alone, and each output is written
// by one of them: results are the same for any number of threads.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace momkd {

// A graph, and in which order its nodes are visited; see momkd.graph.Edges.
struct GraphLists {
  const int32_t *offsets, *sources, *out_offsets, *targets, *position, *order;
  int64_t nodes, edges;
};

// Rows of heads · width columns, `l_stride` and `r_stride` elements from row to row, both of one type. All
// else of nodes and columns (out, its gradient, d_l, d_r) is of that type too, row after row; what is
// reckoned is float32.
struct GraphRows {
  const void *l, *r;
  const float *att;
  RowType type;
  int64_t l_stride, r_stride, heads, width;
  float slope;
};

// Bits from Philox 4x32-10: counter (place mod 2^32, place div 2^32, head div 4, 1), word head mod 4.
struct GraphDropout {
  uint64_t seed;
  uint32_t threshold;  // of the low 16 bits; 0: no dropout
  float scale;         // of what is kept
};

// out (N, H·C), scores (E + N, H) and stats (N, H, 2), the largest score and Σ exp(score − largest), are
// overwritten.
void graph_attention(const GraphLists &graph, const GraphRows &rows, const GraphDropout &dropout, void *out,
                     float *scores, float *stats, int threads);

// From grad (N, H·C) and what the forward gave: d_l, d_r (N, H·C) and d_att (H, C) float32, each unless null.
void graph_attention_backward(const void *grad, const GraphLists &graph, const GraphRows &rows,
                              const GraphDropout &dropout, const float *scores, const float *stats, void *d_l,
                              void *d_r, float *d_att, int threads);

}  // namespace momkd
