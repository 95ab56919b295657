// Checks of the arguments that the kernels use as indices: the kernels themselves trust them. Each throws
// std::invalid_argument, a ValueError in Python, that says what was expected, what came and what to do.
#pragma once

#include <cstdint>

#include "cpu/graph_attention.h"

namespace momkd {

// offsets (bags + 1,) run from 0 to rows and never decrease.
void check_offsets(const int32_t *offsets, int64_t bags, int64_t rows);

// labels (n,) lie in [0, classes), or are −1 for none.
void check_labels(const char *name, const int64_t *labels, int64_t n, int64_t classes);

// nearest (n,) lie in [0, slots).
void check_slots(const int32_t *nearest, int64_t n, int64_t slots);

// The lists by target: offsets, sources, and an order that holds every node once.
void check_graph(const GraphLists &graph);

// The lists by source hold the edges of those by target, each once. After check_graph.
void check_transpose(const GraphLists &graph);

}  // namespace momkd
