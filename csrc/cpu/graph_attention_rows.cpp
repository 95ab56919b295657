// Compiled once for each instruction set, with MOMKD_ISA its name.
#include "cpu/graph_attention_rows.h"

#include "cpu/philox.h"

namespace momkd {
namespace {

constexpr int kVecs = 4;  // held at once: a row is read in pieces of kVecs · kWidth columns

// Vectors of a row; of the last piece of its columns there may be fewer values than lanes.
template <typename Type, bool kWhole>
inline Vec load(const typename Type::stored *at, int64_t count) {
  return kWhole ? Type::load(at) : load_part<Type>(at, count);
}

template <typename Type, bool kWhole>
inline void store(typename Type::stored *at, int64_t count, Vec v) {
  if (kWhole)
    Type::store(at, v);
  else
    store_part<Type>(at, count, v);
}

template <typename Type>
inline const typename Type::stored *row_of(const void *row) {
  return static_cast<const typename Type::stored *>(row);
}

template <typename Type>
inline typename Type::stored *row_of(void *row) {
  return static_cast<typename Type::stored *>(row);
}

// run.template part<vectors, whole>(first column, columns) over all columns.
template <typename Run>
inline void over_columns(int64_t width, const Run &run) {
  int64_t c = 0;
  for (; c + kVecs * kWidth <= width; c += kVecs * kWidth) run.template part<kVecs, true>(c, kWidth);
  for (; c + kWidth <= width; c += kWidth) run.template part<1, true>(c, kWidth);
  if (c < width) run.template part<1, false>(c, width - c);
}

void keep(const GraphDropout &dropout, int64_t place, int64_t count, int64_t heads, float *keep) {
  for (int64_t first = 0; first < count; first += kWidth) {
    const uint64_t at = static_cast<uint64_t>(place + first);
    const BitVec low = reinterpret_cast<BitVec>(kIota) + static_cast<uint32_t>(at);
    const BitVec carried = low < static_cast<uint32_t>(at) ? BitVec{} + 1u : BitVec{};
    const BitVec high = carried + static_cast<uint32_t>(at >> 32);
    const int64_t lanes = count - first < kWidth ? count - first : kWidth;
    for (int64_t block = 0; 4 * block < heads; ++block) {
      const Counters words =
          philox({low, high, BitVec{} + static_cast<uint32_t>(block), BitVec{} + 1u}, dropout.seed);
      const BitVec all[4] = {words.c0, words.c1, words.c2, words.c3};
      for (int64_t h = 4 * block; h < heads && h < 4 * block + 4; ++h)
        for (int64_t lane = 0; lane < lanes; ++lane)
          keep[(first + lane) * heads + h] =
              (all[h % 4][lane] & 0xffffu) >= dropout.threshold ? dropout.scale : 0.0f;
    }
  }
}

inline Vec leaky(Vec s, float slope) { return s > 0 ? s : s * slope; }

// out[e · stride] = Σ_c a_c · LeakyReLU(row_e[c] + r[c]) for kRows rows
template <typename Type, int kRows>
inline void score_rows(const void *const *rows, int64_t column, const typename Type::stored *r,
                       const float *a, int64_t width, float slope, float *out, int64_t stride) {
  const typename Type::stored *row[kRows];
  for (int e = 0; e < kRows; ++e) row[e] = row_of<Type>(rows[e]) + column;
  Vec total[kRows] = {};
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    const Vec here = Type::load(r + c), weight = Float32::load(a + c);
    for (int e = 0; e < kRows; ++e) total[e] += weight * leaky(Type::load(row[e] + c) + here, slope);
  }
  if (c < width) {
    const Vec here = load_part<Type>(r + c, width - c), weight = load_part<Float32>(a + c, width - c);
    for (int e = 0; e < kRows; ++e)
      total[e] += weight * leaky(load_part<Type>(row[e] + c, width - c) + here, slope);
  }
  for (int e = 0; e < kRows; ++e) out[e * stride] = sum_lanes(total[e]);
}

// out[e · stride] = row_e · g for kRows rows
template <typename Type, int kRows>
inline void dot_rows(const void *const *rows, int64_t column, const typename Type::stored *g, int64_t width,
                     float *out, int64_t stride) {
  const typename Type::stored *row[kRows];
  for (int e = 0; e < kRows; ++e) row[e] = row_of<Type>(rows[e]) + column;
  Vec total[kRows] = {};
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    const Vec here = Type::load(g + c);
    for (int e = 0; e < kRows; ++e) total[e] += here * Type::load(row[e] + c);
  }
  if (c < width) {
    const Vec here = load_part<Type>(g + c, width - c);
    for (int e = 0; e < kRows; ++e) total[e] += here * load_part<Type>(row[e] + c, width - c);
  }
  for (int e = 0; e < kRows; ++e) out[e * stride] = sum_lanes(total[e]);
}

template <typename Type>
struct Sum {
  const GraphNode &node;
  int64_t heads, h, column;
  typename Type::stored *out;

  template <int kCount, bool kWhole>
  void part(int64_t c, int64_t count) const {
    Vec total[kCount] = {};
    for (int64_t e = 0; e < node.count; ++e) {
      const float weight = node.weights[e * heads + h];
      const typename Type::stored *row = row_of<Type>(node.rows[e]) + column + c;
      for (int v = 0; v < kCount; ++v) total[v] += weight * load<Type, kWhole>(row + v * kWidth, count);
    }
    for (int v = 0; v < kCount; ++v) store<Type, kWhole>(out + column + c + v * kWidth, count, total[v]);
  }
};

// values[e · stride] = e^(values[e · stride] − top), at once for kWidth of them
inline void exp_strided(float *values, int64_t count, int64_t stride, float top) {
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t lanes = count - first < kWidth ? count - first : kWidth;
    float all[kWidth] = {};
    for (int64_t i = 0; i < lanes; ++i) all[i] = values[(first + i) * stride] - top;
    const Vec e = exp_of(Float32::load(all));
    for (int64_t i = 0; i < lanes; ++i) values[(first + i) * stride] = e[i];
  }
}

template <typename Type>
void hear(const GraphRows &rows, const void *r_row, const GraphNode &node, bool dropout, void *out,
          float *scores, float *stats) {
  const typename Type::stored *r = row_of<Type>(r_row);
  const int64_t heads = rows.heads, width = rows.width;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t column = h * width;
    const float *a = rows.att + column;
    int64_t e = 0;
    for (; e + 4 <= node.count; e += 4)
      score_rows<Type, 4>(node.rows + e, column, r + column, a, width, rows.slope, scores + e * heads + h,
                          heads);
    for (; e < node.count; ++e)
      score_rows<Type, 1>(node.rows + e, column, r + column, a, width, rows.slope, scores + e * heads + h,
                          heads);

    float top = scores[h];
    for (e = 1; e < node.count; ++e) {
      const float score = scores[e * heads + h];
      if (score > top || score != score) top = score;
    }
    if (top == -__builtin_inff()) top = 0;
    stats[2 * h] = top;
    float total = 0, all[kWidth];
    for (int64_t first = 0; first < node.count; first += kWidth) {
      const int64_t lanes = node.count - first < kWidth ? node.count - first : kWidth;
      for (int64_t i = 0; i < kWidth; ++i) all[i] = i < lanes ? scores[(first + i) * heads + h] - top : 0;
      const Vec weights = exp_of(Float32::load(all));
      for (int64_t i = 0; i < lanes; ++i) {
        total += weights[i];
        float &weight = node.weights[(first + i) * heads + h];
        weight = dropout ? weight * weights[i] : weights[i];
      }
    }
    stats[2 * h + 1] = total;
    const float divide = 1 / (total == 0 ? 1 : total);
    for (e = 0; e < node.count; ++e) node.weights[e * heads + h] *= divide;
    over_columns(width, Sum<Type>{node, heads, h, column, row_of<Type>(out)});
  }
}

template <typename Type>
struct Meet {
  const GraphNode &node;
  const typename Type::stored *r;
  const float *a, *pair;
  int64_t heads, h, column;
  float slope;
  typename Type::stored *d_r;
  float *d_att;

  template <int kCount, bool kWhole>
  void part(int64_t c, int64_t count) const {
    Vec here[kCount], through[kCount] = {}, toward[kCount] = {};
    for (int v = 0; v < kCount; ++v) here[v] = load<Type, kWhole>(r + column + c + v * kWidth, count);
    for (int64_t e = 0; e < node.count; ++e) {
      const Vec d = Vec{} + pair[(e * heads + h) * 2 + 1], less = d * slope;
      const typename Type::stored *row = row_of<Type>(node.rows[e]) + column + c;
      for (int v = 0; v < kCount; ++v) {
        const Vec s = load<Type, kWhole>(row + v * kWidth, count) + here[v];
        const Vec passed = s > 0 ? d : less;
        through[v] += passed;
        toward[v] += passed * s;
      }
    }
    for (int v = 0; v < kCount; ++v) {
      const int64_t at = column + c + v * kWidth;
      if (d_r) store<Type, kWhole>(d_r + at, count, load<Float32, kWhole>(a + at, count) * through[v]);
      if (d_att)
        store<Float32, kWhole>(d_att + at, count, load<Float32, kWhole>(d_att + at, count) + toward[v]);
    }
  }
};

template <typename Type>
void hear_backward(const GraphRows &rows, const void *r, const GraphNode &node, bool dropout,
                   const void *grad_row, const float *scores, const float *stats, float *pair, void *d_r,
                   float *d_att) {
  const typename Type::stored *grad = row_of<Type>(grad_row);
  const int64_t heads = rows.heads, width = rows.width, step = 2 * heads;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t column = h * width;
    float *d = pair + 2 * h + 1;
    int64_t e = 0;
    for (; e + 4 <= node.count; e += 4)
      dot_rows<Type, 4>(node.rows + e, column, grad + column, width, d + e * step, step);
    for (; e < node.count; ++e)
      dot_rows<Type, 1>(node.rows + e, column, grad + column, width, d + e * step, step);

    const float top = stats[2 * h], divide = 1 / (stats[2 * h + 1] == 0 ? 1 : stats[2 * h + 1]);
    for (e = 0; e < node.count; ++e) pair[e * step + 2 * h] = scores[e * heads + h];
    exp_strided(pair + 2 * h, node.count, step, top);
    float mean = 0;  // of dα under α, from the products themselves: `out` is rounded to the type of rows
    for (e = 0; e < node.count; ++e) {
      const float weight = pair[e * step + 2 * h] * divide;
      if (dropout) d[e * step] *= node.weights[e * heads + h];
      mean += weight * d[e * step];
      pair[e * step + 2 * h] = weight;
    }
    for (e = 0; e < node.count; ++e) {
      float &weight = pair[e * step + 2 * h];
      d[e * step] = weight * (d[e * step] - mean);
      if (dropout) weight *= node.weights[e * heads + h];
    }
    if (d_r || d_att)
      over_columns(width, Meet<Type>{node, row_of<Type>(r), rows.att, pair, heads, h, column, rows.slope,
                                     row_of<Type>(d_r), d_att});
  }
}

template <typename Type>
struct Heard {
  const GraphSource &source;
  const typename Type::stored *l;
  const float *a;
  int64_t h, column;
  float slope;
  typename Type::stored *d_l;

  template <int kCount, bool kWhole>
  void part(int64_t c, int64_t count) const {
    Vec here[kCount], given[kCount] = {}, through[kCount] = {};
    for (int v = 0; v < kCount; ++v) here[v] = load<Type, kWhole>(l + column + c + v * kWidth, count);
    for (int64_t e = 0; e < source.count; ++e) {
      const float weight = source.pair[e][2 * h];
      const typename Type::stored *r = row_of<Type>(source.r[e]) + column + c;
      const typename Type::stored *g = row_of<Type>(source.grad[e]) + column + c;
      const Vec d = Vec{} + source.pair[e][2 * h + 1], less = d * slope;
      for (int v = 0; v < kCount; ++v) {
        const Vec s = load<Type, kWhole>(r + v * kWidth, count) + here[v];
        given[v] += weight * load<Type, kWhole>(g + v * kWidth, count);
        through[v] += s > 0 ? d : less;
      }
    }
    for (int v = 0; v < kCount; ++v) {
      const int64_t at = column + c + v * kWidth;
      store<Type, kWhole>(d_l + at, count, given[v] + load<Float32, kWhole>(a + at, count) * through[v]);
    }
  }
};

template <typename Type>
void heard_backward(const GraphRows &rows, const void *l, const GraphSource &source, void *d_l) {
  for (int64_t h = 0; h < rows.heads; ++h)
    over_columns(rows.width, Heard<Type>{source, row_of<Type>(l), rows.att, h, h * rows.width, rows.slope,
                                         row_of<Type>(d_l)});
}

}  // namespace

extern const GraphKernels MOMKD_CONCAT(graph_rows_, MOMKD_ISA);
const GraphKernels MOMKD_CONCAT(graph_rows_, MOMKD_ISA) = {
    keep,
    {hear<Float32>, hear<Float16>, hear<Bfloat16>},
    {hear_backward<Float32>, hear_backward<Float16>, hear_backward<Bfloat16>},
    {heard_backward<Float32>, heard_backward<Float16>, heard_backward<Bfloat16>}};

}  // namespace momkd
