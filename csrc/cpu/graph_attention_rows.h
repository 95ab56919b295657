// The inner loops of graph_attention: one node, for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/graph_attention.h"

namespace momkd {

// What the pairs of one node need: rows of the others, itself last, and where their numbers lie.
struct GraphNode {
  int64_t count;            // pairs
  int64_t place;            // of the first, where the node hears
  const void *const *rows;  // (count,) l of those that are heard
  float *weights;           // (count, H): scratch, and what is kept of dropout
};

// What the pairs of one source need: where it is heard, itself last.
struct GraphSource {
  int64_t count;
  const void *const *r;      // (count,) rows r of those that hear it
  const void *const *grad;   // (count,) and of their gradient
  const float *const *pair;  // (count,) their (H, 2): drop(α) and de
};

// For each type of rows, in the order of RowType.
struct GraphKernels {
  // keep[count, H]: 0, or the scale of what is kept, of the places from `place` on
  void (*keep)(const GraphDropout &dropout, int64_t place, int64_t count, int64_t heads, float *keep);
  // One node that hears: out (H·C), scores (count, H), stats (H, 2)
  void (*hear[3])(const GraphRows &rows, const void *r, const GraphNode &node, bool dropout, void *out,
                  float *scores, float *stats);
  // Its gradients: pair (count, H, 2) becomes drop(α) and de; d_r (H·C) unless null; d_att (H·C) is added to
  // unless null
  void (*hear_backward[3])(const GraphRows &rows, const void *r, const GraphNode &node, bool dropout,
                           const void *grad, const float *scores, const float *stats, float *pair, void *d_r,
                           float *d_att);
  // One node that is heard: d_l (H·C)
  void (*heard_backward[3])(const GraphRows &rows, const void *l, const GraphSource &source, void *d_l);
};

extern const GraphKernels graph_rows_baseline;
extern const GraphKernels graph_rows_avx2;
extern const GraphKernels graph_rows_avx512;

}  // namespace momkd
