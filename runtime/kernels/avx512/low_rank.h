// The low-rank change of some rows of a product: y += f (x A) B, f being a row's factor, zero for the base stream's.
#pragma once

#include <stdatomic.h>

#include "../checks.h"

typedef struct {
  const float* x;     // (all rows, k)
  const void *a, *b;  // (k, rank), (rank, n): float32, or float16 where `half_a`, `half_b`
  int half_a, half_b;
  size_t k, n, rank, width;  // width: of a row of `low`, `rank` rounded up to whole registers
  size_t rows;               // that are changed
  size_t* index;             // (rows) which ones those are
  float* factor;             // (rows)
  float* low;                // (parts, rows, width): f x A, the first part becomes the sum once `ready`
  size_t parts, groups;      // x A is divided into parts of k, or groups of rows
  atomic_size_t claimed, done;
  atomic_int ready;
} ImsmLowRank;

// Finds the changed rows of x (rows, k): the factors are at input `factors`, one per row, or one per run of equally
// many rows, A (k, rank) at input `a`, B (rank, n) after it. imsm_low_rank_end frees what `change` holds, even after a
// failure; `change` must be zero before the call.
OrtStatus* imsm_low_rank_begin(ImsmLowRank* change, ImsmInputs* inputs, size_t factors, size_t a, const float* x,
                               size_t rows, size_t k, size_t n);
void imsm_low_rank_end(ImsmLowRank* change);

// Every thread that needs `low` calls this: the callers compute it together.
void imsm_low_rank_wait(ImsmLowRank* change);

// Fetches what `imsm_low_rank_add` reads for columns [column, column + width).
void imsm_low_rank_fetch(const ImsmLowRank* change, size_t column, size_t width);

// Adds the change of columns [column, column + width) to those of rows [first, first + rows) that are changed; sums
// (rows, stride) begin at that row and column.
void imsm_low_rank_add(const ImsmLowRank* change, size_t first, size_t rows, size_t column, size_t width, float* sums,
                       size_t stride);
