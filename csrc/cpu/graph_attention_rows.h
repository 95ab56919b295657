// The inner loops of graph_attention: one node, for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/graph_attention.h"

namespace momkd {

// What the pairs of one node need: rows of the others, itself last, and where their numbers lie.
struct GraphNode {
  int64_t count;             // pairs
  int64_t place;             // of the first, where the node hears
  const float *const *rows;  // (count,) l of those that are heard
  float *weights;            // (count, H): scratch, and what is kept of dropout
};

// What the pairs of one source need: where it is heard, itself last.
struct GraphSource {
  int64_t count;
  const float *const *r;     // (count,) rows r of those that hear it
  const float *const *grad;  // (count,) and of their gradient
  const float *const *pair;  // (count,) their (H, 2): drop(α) and de
};

struct GraphKernels {
  // keep[count, H]: 0, or the scale of what is kept, of the places from `place` on
  void (*keep)(const GraphDropout &dropout, int64_t place, int64_t count, int64_t heads, float *keep);
  // One node that hears: out (H·C), scores (count, H), stats (H, 2)
  void (*hear)(const GraphRows &rows, const float *r, const GraphNode &node, bool dropout, float *out,
               float *scores, float *stats);
  // Its gradients: pair (count, H, 2) becomes drop(α) and de; d_r (H·C) unless null; d_att (H·C) is added to
  // unless null
  void (*hear_backward)(const GraphRows &rows, const float *r, const GraphNode &node, bool dropout,
                        const float *grad, const float *out, const float *scores, const float *stats,
                        float *pair, float *d_r, float *d_att);
  // One node that is heard: d_l (H·C)
  void (*heard_backward)(const GraphRows &rows, const float *l, const GraphSource &source, float *d_l);
};

extern const GraphKernels graph_rows_baseline;
extern const GraphKernels graph_rows_avx2;
extern const GraphKernels graph_rows_avx512;

}  // namespace momkd
