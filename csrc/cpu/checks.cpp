#include "cpu/checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace momkd {
namespace {

const char *const kMakeGraph = "; make graphs by momkd.graph";

[[noreturn]] void fail(const std::string &name, const std::string &expected, const std::string &got,
                       const std::string &remedy) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got + remedy);
}

std::string at(int64_t value, int64_t index) {
  return std::to_string(value) + " at index " + std::to_string(index);
}

// values (n,) lie in [low, end). Two loops: the first has no exit, so it runs on vectors.
template <typename T>
void check_range(const char *name, const T *values, int64_t n, int64_t low, int64_t end,
                 const std::string &expected, const char *remedy) {
  bool fine = true;
  for (int64_t i = 0; i < n; ++i) fine &= values[i] >= low && values[i] < end;
  if (fine) return;
  for (int64_t i = 0; i < n; ++i)
    if (values[i] < low || values[i] >= end) fail(name, expected, at(values[i], i), remedy);
}

template <typename T>
void check_below(const char *name, const T *values, int64_t n, int64_t end, const char *remedy) {
  check_range(name, values, n, 0, end, "0 to " + std::to_string(end - 1), remedy);
}

// `end` names what the last offset must be.
void check_ends(const char *name, const int32_t *offsets, int64_t lists, int64_t last, const char *end,
                const char *remedy) {
  if (offsets[0] != 0 || offsets[lists] != last)
    fail(name, "to run from 0 to " + std::string(end) + " = " + std::to_string(last),
         std::to_string(offsets[0]) + " to " + std::to_string(offsets[lists]), remedy);
  bool fine = true;
  for (int64_t i = 0; i < lists; ++i) fine &= offsets[i] <= offsets[i + 1];
  if (fine) return;
  for (int64_t i = 0; i < lists; ++i)
    if (offsets[i] > offsets[i + 1])
      fail(name, "never to decrease", std::to_string(offsets[i]) + " and then " + at(offsets[i + 1], i + 1),
           remedy);
}

// values (n,) hold each of 0 to n − 1 once.
void check_permutation(const char *name, const int32_t *values, int64_t n) {
  check_below(name, values, n, n, kMakeGraph);
  std::vector<char> seen(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    if (seen[static_cast<size_t>(values[i])])
      fail(name, "each of 0 to " + std::to_string(n - 1) + " once", at(values[i], i) + " again", kMakeGraph);
    seen[static_cast<size_t>(values[i])] = 1;
  }
}

}  // namespace

void check_offsets(const int32_t *offsets, int64_t bags, int64_t rows) {
  if (bags < 0)
    fail("offsets", "int32 (B+1,)", "(" + std::to_string(bags + 1) + ",)", "; use Bags.from_list");
  check_ends("offsets", offsets, bags, rows, "N", "; use Bags.from_list");
}

void check_labels(const char *name, const int64_t *labels, int64_t n, int64_t classes) {
  check_range(name, labels, n, -1, classes, "0 to " + std::to_string(classes - 1) + ", or -1 for none",
              "; use -1 for rows that don't count, or a memory of more classes");
}

void check_slots(const int32_t *nearest, int64_t n, int64_t slots) {
  check_below("slots", nearest, n, slots, "; pass the slots that the forward gave for this memory");
}

void check_graph(const GraphLists &graph) {
  check_ends("edges.offsets", graph.offsets, graph.nodes, graph.edges, "E", kMakeGraph);
  check_below("edges.sources", graph.sources, graph.edges, graph.nodes, kMakeGraph);
  check_permutation("edges.order", graph.order, graph.nodes);
}

void check_transpose(const GraphLists &graph) {
  check_ends("edges.out_offsets", graph.out_offsets, graph.nodes, graph.edges, "E", kMakeGraph);
  check_below("edges.targets", graph.targets, graph.edges, graph.nodes, kMakeGraph);
  check_permutation("edges.position", graph.position, graph.edges);
  for (int64_t source = 0; source < graph.nodes; ++source)
    for (int64_t e = graph.out_offsets[source]; e < graph.out_offsets[source + 1]; ++e) {
      const int32_t place = graph.position[e], target = graph.targets[e];
      if (graph.sources[place] != source || place < graph.offsets[target] ||
          place >= graph.offsets[target + 1])
        fail("edges.position",
             "the place in sources of the edge from " + std::to_string(source) + " to " +
                 std::to_string(target),
             at(place, e), kMakeGraph);
    }
}

}  // namespace momkd
