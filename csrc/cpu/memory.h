// Cosines of rows with the slots of the memory, reduced over the slots of each class, and pooling that
// follows them.
//
//   max: s_ic = max_k cos(z_i, M_ck);  lse: s_ic = (1/τ) log Σ_k exp(τ cos(z_i, M_ck))
//
// The (N, C, K) cosines are never stored. Of equal slots the lowest is the nearest.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace momkd {

struct MemoryShape {
  int64_t classes, slots, width;
};

// similarity (N, C) and nearest (N, C) are overwritten. tau > 0 for lse, 0 for max. memory (C, K, S).
void memory_similarity(const Rows &z, const float *memory, const MemoryShape &shape, float tau,
                       float *similarity, int32_t *nearest, int threads);

// From grad (N, C): d_z (as z, rows one after the other) and d_memory (C, K, S) float32, each unless null. A
// row whose grad is 0 gets 0 and gives nothing, were it NaN.
void memory_similarity_backward(const float *grad, const Rows &z, const float *memory,
                                const MemoryShape &shape, float tau, const int32_t *nearest, void *d_z,
                                float *d_memory, int threads);

struct SoftAngle {
  const int64_t *labels;  // (N,): −1 gives loss 0 and no gradient
  float margin, tau, beta;
};

// Δ = s_y − the largest other s_c, by lse; losses (N,) = softplus(β (margin − Δ)).
void soft_angle_loss(const Rows &z, const float *memory, const MemoryShape &shape, const SoftAngle &angle,
                     float *losses, int threads);

// From grad (N,): d_z and d_memory as of memory_similarity_backward.
void soft_angle_loss_backward(const float *grad, const Rows &z, const float *memory, const MemoryShape &shape,
                              const SoftAngle &angle, void *d_z, float *d_memory, int threads);

struct GuidedBags {
  const int32_t *offsets;
  int64_t bags;
  bool per_class;  // heads = C, else 1
  float temperature;
};

// pooled (B, H, L) float32, attention (N, H) and nearest (N, C) are overwritten.
void memory_guided_pool(const Rows &z, const Rows &values, const float *memory, const MemoryShape &shape,
                        const GuidedBags &bags, float *pooled, float *attention, int32_t *nearest,
                        int threads);

// From grad (B, H, L): d_z (as z), d_values (as values), both with rows one after the other, and
// d_temperature (1), each unless null.
void memory_guided_pool_backward(const float *grad, const Rows &z, const Rows &values, const float *memory,
                                 const MemoryShape &shape, const GuidedBags &bags, const float *attention,
                                 const int32_t *nearest, void *d_z, void *d_values, float *d_temperature,
                                 int threads);

}  // namespace momkd
