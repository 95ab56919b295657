// Softmax pooling over the rows of each bag.
//
//   α_ih = exp(scores_ih − top_bh) / total_bh,  pooled_bh = Σ_{i in b} α_ih · values_i
//
// The rows are cut into pieces that never cross a bag, by sizes alone: results are the same for any number of
// threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/rows.h"

namespace momkd {

struct BagPiece {
  int64_t bag, first, last;
};

struct BagPieces {
  BagPieces(const int32_t *offsets, int64_t bags);

  static constexpr int64_t kRows = 512;  // of a piece, at most
  int64_t bags;
  std::vector<BagPiece> pieces;
  std::vector<int64_t> begin;  // (bags + 1,): where the pieces of each bag begin
};

// One softmax and weighted sum a piece, to be combined: (pieces, H, L) and (pieces, H, 2).
class PartialPools {
 public:
  PartialPools(const BagPieces &pieces, const Rows &values, int64_t heads, int workers);
  ~PartialPools();
  // Of the rows of a piece, with their scores (rows of the piece, H).
  void piece(int64_t number, const float *scores, int worker);
  // pooled (B, H, L) and stats (B, H, 2): the largest score and Σ exp(score − largest); zeros where there is
  // none.
  void combine(float *pooled, float *stats, int threads) const;
  const std::vector<BagPiece> &pieces() const { return pieces_.pieces; }

 private:
  struct Memory;
  const BagPieces &pieces_;
  const Rows &values_;
  const int64_t heads_;
  Memory *memory_;
};

// pooled (B, H, L) float32 and stats (B, H, 2) are overwritten; scores (N, H).
void attention_pool(const Rows &values, const float *scores, const int32_t *offsets, int64_t bags,
                    int64_t heads, float *pooled, float *stats, int threads);

// The weights α (N, H) from scores and stats; `weights` may be `scores`.
void softmax_weights(const float *scores, const float *stats, const BagPieces &pieces, int64_t heads,
                     float *weights, int threads);

// From grad (B, H, L) and stats: d_scores (N, H) and d_values (as values, rows one after the other), each
// unless null.
//   d_scores_ih = α_ih (grad_bh · values_i − Σ_j α_jh grad_bh · values_j),  d_values_i = Σ_h α_ih grad_bh
void attention_pool_backward(const float *grad, const Rows &values, const float *scores,
                             const int32_t *offsets, int64_t bags, int64_t heads, const float *stats,
                             float *d_scores, void *d_values, int threads);

// Of one piece, from the weights α (N, H): the products grad_bh · values_i (N, H) and d_values, each unless
// null.
void pool_backward_piece(const BagPiece &piece, const Rows &values, const float *grad, const float *weights,
                         int64_t heads, float *dots, void *d_values);

// Those products become d_scores. Their mean is taken from themselves, so that the gradients of a bag's
// scores sum to nothing, and that of its only row is 0.
void softmax_backward(const BagPieces &pieces, const float *weights, int64_t heads, float *d_scores,
                      int threads);

}  // namespace momkd
