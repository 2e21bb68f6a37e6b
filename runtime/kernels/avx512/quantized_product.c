// A product reads its weights from where the file is mapped, in the file's layout: nothing is packed when a graph is
// loaded.
//
// Few rows are bound by memory: columns are read one after the other, as they lie in the file. Many rows are bound by
// arithmetic: 32 columns' weights of one block are put into lanes once, for all rows.
#include "quantized_product.h"

#include <string.h>

#include "target.h"

enum {
  TILE = 256,          // rows of one tile, at most
  WIDE = 32,           // columns of one tile
  TASK = 64,           // columns of one task where rows are few
  LINE = 64,           // bytes of a cache line
  AHEAD = 8192,        // bytes of weights to fetch before they are needed: hardware prefetching stops at a page's end
  SCALES_AHEAD = 512,  // scales
};

// A matrix and the place of a task in it.
typedef struct {
  const ImsmActivations* x;
  const ImsmQuantizedMatrix* matrix;
  size_t per_column;   // scales
  size_t bytes;        // of a column's weights
  size_t more_bytes;   // of their other bits
  size_t zeros_bytes;  // of a column's zero points
  float* y;
} Product;

// Up to four scales, or their first `count` ones.
TARGET static inline __m128 load_scales(const ImsmQuantizedMatrix* matrix, size_t at, __mmask8 known) {
  if (matrix->half) return _mm_cvtph_ps(_mm_maskz_loadu_epi16(known, (const uint16_t*)matrix->scales + at));
  return _mm_maskz_loadu_ps(known, (const float*)matrix->scales + at);
}

static inline __mmask64 first_bytes(size_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

static inline const char* scale_address(const ImsmQuantizedMatrix* matrix, size_t at) {
  return (const char*)matrix->scales + at * (matrix->half ? 2 : 4);
}

// Up to four zero points of a column.
TARGET static inline __m128i load_zeros(const Product* product, size_t column, size_t at, size_t count,
                                        const int bits) {
  const uint8_t* zeros = product->matrix->zeros + column * product->zeros_bytes;
  int32_t found[4] = {0};
  for (size_t i = at; i < at + count; i++) found[i - at] = bits == 4 ? zeros[i / 2] >> 4 * (i % 2) & 15 : zeros[i];
  return _mm_loadu_si128((const __m128i*)found);
}

// The other bits of a chunk's weights, even ones or odd ones, put below the four that are in their place. A lane's
// field is where the shift by its place puts it.
TARGET static inline __attribute__((always_inline)) __m512i add_bits(__m512i four, const uint8_t* more,
                                                                     const int extra) {
  __m512i fields, places;
  if (extra == 1) {
    int64_t bytes;
    memcpy(&bytes, more, sizeof bytes);
    fields = _mm512_set1_epi64(bytes);
    places = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    fields = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)more));
    places = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
  }
  const __m512i mask = _mm512_set1_epi8((char)((1 << extra) - 1));
  return _mm512_or_si512(four, _mm512_and_si512(_mm512_srlv_epi64(fields, places), mask));
}

// One or two columns of up to four rows. `spread` puts the scale of each of the chunk's blocks into its lanes.
TARGET static inline __attribute__((always_inline)) void two_columns(const Product* product, size_t column,
                                                                     size_t first, const int rows, const int columns,
                                                                     const int bits, const int zeros, __m512i spread,
                                                                     size_t scales_per_chunk) {
  const ImsmActivations* activations = product->x;
  const ImsmQuantizedMatrix* matrix = product->matrix;
  const size_t bytes = product->bytes, per_column = product->per_column;
  const int extra = imsm_extra(bits);
  const __m512i high = _mm512_set1_epi8((char)(15 << extra));
  const uint8_t *weights[2], *more[2];
  size_t scales[2];
  __m512 sums[2][4];
  for (int c = 0; c < columns; c++) {
    weights[c] = matrix->weights + (column + c) * bytes;
    if (extra) more[c] = matrix->more + (column + c) * product->more_bytes;
    scales[c] = (column + c) * per_column;
    for (int r = 0; r < rows; r++) sums[c][r] = _mm512_setzero_ps();
  }
  const size_t step = IMSM_CHUNK * (size_t)imsm_stored(bits) / 8, last = activations->chunks - 1;
  const size_t more_step = IMSM_CHUNK * (size_t)extra / 8;
  const size_t last_bytes = bytes - last * step, last_scales = per_column - last * scales_per_chunk;
  for (size_t chunk = 0; chunk <= last; chunk++) {
    const size_t left = chunk < last ? step : last_bytes;
    const size_t scales_here = chunk < last ? scales_per_chunk : last_scales;
    const __mmask8 known = (__mmask8)((1u << scales_here) - 1);
    __m512i even[2], odd[2], zero[2];
    __m512 scale[2];
    for (int c = 0; c < columns; c++) {
      const size_t at = scales[c] + chunk * scales_per_chunk;
      if (first == 0) {
        for (size_t line = 0; line < step; line += LINE)
          _mm_prefetch((const char*)weights[c] + chunk * step + line + AHEAD, _MM_HINT_T0);
        if (extra) _mm_prefetch((const char*)more[c] + chunk * more_step + AHEAD * extra / 4, _MM_HINT_T0);
        _mm_prefetch(scale_address(matrix, at + SCALES_AHEAD), _MM_HINT_T0);
      }
      const __m512i both = _mm512_maskz_loadu_epi8(first_bytes(left), weights[c] + chunk * step);
      if (bits != 8) {
        even[c] = _mm512_and_si512(_mm512_slli_epi16(both, extra), high);
        odd[c] = _mm512_and_si512(_mm512_srli_epi16(both, 4 - extra), high);
        if (extra) {
          even[c] = add_bits(even[c], more[c] + chunk * more_step, extra);
          odd[c] = add_bits(odd[c], more[c] + chunk * more_step + more_step / 2, extra);
        }
      } else {  // the first sixteen of the four blocks, and the last
        const size_t rest = left > 64 ? left - 64 : 0;
        const __m512i next = _mm512_maskz_loadu_epi8(first_bytes(rest), weights[c] + chunk * step + (rest ? 64 : 0));
        even[c] = _mm512_shuffle_i64x2(both, next, 0x88);
        odd[c] = _mm512_shuffle_i64x2(both, next, 0xdd);
      }
      if (zeros)
        zero[c] = _mm512_permutexvar_epi32(
            spread,
            _mm512_castsi128_si512(load_zeros(product, column + c, chunk * scales_per_chunk, scales_here, bits)));
      scale[c] = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(load_scales(matrix, at, known)));
    }
    for (int r = 0; r < rows; r++) {
      const ImsmChunk* x = activations->by_chunk + (first + r) * activations->chunks + chunk;
      const __m512i x_even = _mm512_loadu_si512(x->even), x_odd = _mm512_loadu_si512(x->odd);
      const __m512i start = _mm512_loadu_si512(x->start);
      const __m512 x_scale = _mm512_loadu_ps(x->scale);
      for (int c = 0; c < columns; c++) {
        const __m512i from = zeros ? _mm512_mullo_epi32(_mm512_srai_epi32(start, imsm_middle(bits)), zero[c]) : start;
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(from, even[c], x_even), odd[c], x_odd);
        sums[c][r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), x_scale), scale[c], sums[c][r]);
      }
    }
  }
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++)
      product->y[(first + r) * matrix->n + column + c] =
          _mm512_reduce_add_ps(sums[c][r]) + (matrix->bias ? matrix->bias[column + c] : 0.0f);
}

TARGET static inline __attribute__((always_inline)) void few_rows(const Product* product, size_t first, size_t columns,
                                                                  const int bits, const int zeros) {
  const ImsmQuantizedMatrix* matrix = product->matrix;
  const size_t end = first + columns, rows = product->x->rows;
  int32_t lanes[16];
  for (int lane = 0; lane < 16; lane++) lanes[lane] = 8 * lane / (int)matrix->block_size;
  const __m512i spread = _mm512_loadu_si512(lanes);
  const size_t scales = IMSM_CHUNK / matrix->block_size;
  if (matrix->change) {
    imsm_low_rank_wait(matrix->change);
    imsm_low_rank_fetch(matrix->change, first, columns);
  }
  // All columns for four rows at a time, so that those stay in the nearest cache.
  for (size_t row = 0; row < rows; row += 4) {
    const size_t left = rows - row;
#define ROWS(COUNT)                                                             \
  for (size_t column = first; column < end; column += 2) {                      \
    if (end - column >= 2)                                                      \
      two_columns(product, column, row, COUNT, 2, bits, zeros, spread, scales); \
    else                                                                        \
      two_columns(product, column, row, COUNT, 1, bits, zeros, spread, scales); \
  }
    if (left >= 4) {
      ROWS(4)
    } else if (left == 3) {
      ROWS(3)
    } else if (left == 2) {
      ROWS(2)
    } else {
      ROWS(1)
    }
#undef ROWS
  }
  if (matrix->change) imsm_low_rank_add(matrix->change, 0, rows, first, columns, product->y + first, matrix->n);
}

// Sixteen bytes of each of 16 columns from `column` on, which are `stride` apart: registers of four bytes a lane, one
// column a lane.
TARGET static inline __attribute__((always_inline)) void gather(const Product* product, const uint8_t* bytes,
                                                                size_t stride, size_t column, __m512i lanes[4]) {
  const size_t last = product->matrix->n - 1;
  __m512i rows[4];
  for (size_t r = 0; r < 4; r++) {
    const __m128i* parts[4];
    for (size_t part = 0; part < 4; part++) {
      const size_t wanted = column + 4 * part + r < last ? column + 4 * part + r : last;
      parts[part] = (const __m128i*)(bytes + wanted * stride);
    }
    rows[r] = _mm512_castsi128_si512(_mm_loadu_si128(parts[0]));
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[1]), 1);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[2]), 2);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[3]), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  lanes[0] = _mm512_unpacklo_epi64(a, c), lanes[1] = _mm512_unpackhi_epi64(a, c);
  lanes[2] = _mm512_unpacklo_epi64(b, d), lanes[3] = _mm512_unpackhi_epi64(b, d);
}

// The other bits of a block's weights for 16 columns from `column` on, put below the four that are in their place.
TARGET static inline __attribute__((always_inline)) void gather_bits(const Product* product, size_t column,
                                                                     size_t block, const int extra, __m512i even[4],
                                                                     __m512i odd[4]) {
  const size_t in_chunk = block % (IMSM_CHUNK / IMSM_BLOCK), chunk = block / (IMSM_CHUNK / IMSM_BLOCK);
  const uint8_t* bytes = product->matrix->more + chunk * IMSM_CHUNK * (size_t)extra / 8;
  const __m512i mask = _mm512_set1_epi8((char)((1 << extra) - 1));
  __m512i all[2][4];  // of 5 bits the first half of the first is of even weights, the other half of odd ones
  for (int i = 0; i < extra; i++) gather(product, bytes + 16 * i, product->more_bytes, column, all[i]);
  for (int i = 0; i < 4; i++) {
    const __m128i place = _mm_cvtsi32_si128(2 * (int)in_chunk + (extra == 1 ? i / 2 : 0));
    const __m512i evens = extra == 1 ? all[0][i % 2] : all[0][i], odds = extra == 1 ? all[0][2 + i % 2] : all[1][i];
    even[i] = _mm512_or_si512(even[i], _mm512_and_si512(_mm512_srl_epi32(evens, place), mask));
    odd[i] = _mm512_or_si512(odd[i], _mm512_and_si512(_mm512_srl_epi32(odds, place), mask));
  }
}

// The 32 weights of a block for 16 columns from `column` on.
TARGET static inline __attribute__((always_inline)) void unpack(const Product* product, size_t column, size_t block,
                                                                const int bits, __m512i even[4], __m512i odd[4]) {
  const int extra = imsm_extra(bits);
  const uint8_t* bytes = product->matrix->weights + block * IMSM_BLOCK * (size_t)imsm_stored(bits) / 8;
  gather(product, bytes, product->bytes, column, even);
  if (bits == 8) {
    gather(product, bytes + IMSM_BLOCK / 2, product->bytes, column, odd);
    return;
  }
  const __m512i high = _mm512_set1_epi8((char)(15 << extra));
  for (int i = 0; i < 4; i++) {
    odd[i] = _mm512_and_si512(_mm512_srli_epi16(even[i], 4 - extra), high);
    even[i] = _mm512_and_si512(_mm512_slli_epi16(even[i], extra), high);
  }
  if (extra) gather_bits(product, column, block, extra, even, odd);
}

// The zero points of a block for `columns` columns.
TARGET static inline void block_zeros(const Product* product, size_t first, size_t columns, size_t block,
                                      const int bits, __m512i zeros[2]) {
  const size_t at = block * IMSM_BLOCK / product->matrix->block_size;
  int32_t found[WIDE] = {0};
  for (size_t c = 0; c < columns; c++) found[c] = _mm_cvtsi128_si32(load_zeros(product, first + c, at, 1, bits));
  for (int half = 0; half < 2; half++) zeros[half] = _mm512_loadu_si512(found + 16 * half);
}

// The scales of a block for `columns` columns, zero for the others.
TARGET static inline void block_scales(const Product* product, size_t first, size_t columns, size_t block,
                                       __m512 scales[2]) {
  const ImsmQuantizedMatrix* matrix = product->matrix;
  const size_t at = first * product->per_column + block * IMSM_BLOCK / matrix->block_size;
  if (matrix->half) {
    uint16_t found[WIDE] = {0};
    for (size_t c = 0; c < columns; c++) found[c] = ((const uint16_t*)matrix->scales)[at + c * product->per_column];
    for (int half = 0; half < 2; half++)
      scales[half] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(found + 16 * half)));
  } else {
    float found[WIDE] = {0};
    for (size_t c = 0; c < columns; c++) found[c] = ((const float*)matrix->scales)[at + c * product->per_column];
    for (int half = 0; half < 2; half++) scales[half] = _mm512_loadu_ps(found + 16 * half);
  }
}

TARGET static inline __m512i four(const int8_t* values) {
  int32_t word;
  memcpy(&word, values, 4);
  return _mm512_set1_epi32(word);
}

TARGET static inline __attribute__((always_inline)) void many_rows(const Product* product, size_t column,
                                                                   size_t columns, const int bits, const int zeros) {
  const int extra = imsm_extra(bits);
  const size_t block_bytes = IMSM_BLOCK * (size_t)imsm_stored(bits) / 8;
  const ImsmActivations* activations = product->x;
  const ImsmQuantizedMatrix* matrix = product->matrix;
  float sums[TILE][WIDE], bias[WIDE] = {0};
  if (matrix->bias) memcpy(bias, matrix->bias + column, columns * sizeof(float));
  if (matrix->change) imsm_low_rank_wait(matrix->change);
  for (size_t first = 0; first < activations->rows; first += TILE) {
    const size_t rows = activations->rows - first < TILE ? activations->rows - first : TILE;
    for (size_t row = 0; row < rows; row++) memcpy(sums[row], bias, sizeof bias);
    if (matrix->change) imsm_low_rank_add(matrix->change, first, rows, column, columns, sums[0], WIDE);
    for (size_t block = 0; block < activations->blocks; block++) {
      __m512i even[2][4], odd[2][4], zero[2];
      __m512 scale[2];
      if (block * block_bytes % LINE == 0)
        for (size_t c = 0; c < columns; c++) {
          const size_t at = (column + c) * product->per_column + block * IMSM_BLOCK / matrix->block_size;
          _mm_prefetch((const char*)matrix->weights + (column + c) * product->bytes + block * block_bytes + 2 * LINE,
                       _MM_HINT_T0);
          if (extra)
            _mm_prefetch((const char*)matrix->more + (column + c) * product->more_bytes +
                             (block * (size_t)extra * 4 & ~(size_t)(LINE - 1)) + LINE,
                         _MM_HINT_T0);
          _mm_prefetch(scale_address(matrix, at + 8), _MM_HINT_T0);
        }
      for (size_t half = 0; half < 2; half++) unpack(product, column + 16 * half, block, bits, even[half], odd[half]);
      block_scales(product, column, columns, block, scale);
      if (zeros) block_zeros(product, column, columns, block, bits, zero);
      const ImsmBlock* x = activations->by_block + block * activations->rows + first;
      for (size_t row = 0; row < rows; row++, x++) {
        __m512i dot[2] = {_mm512_set1_epi32(x->start), _mm512_set1_epi32(x->start)};
        if (zeros)
          for (int half = 0; half < 2; half++)
            dot[half] = _mm512_mullo_epi32(_mm512_set1_epi32(x->start >> imsm_middle(bits)), zero[half]);
        for (int i = 0; i < 4; i++) {
          const __m512i x_even = four(x->even + 4 * i), x_odd = four(x->odd + 4 * i);
          for (int half = 0; half < 2; half++) {
            dot[half] = _mm512_dpbusd_epi32(dot[half], even[half][i], x_even);
            dot[half] = _mm512_dpbusd_epi32(dot[half], odd[half][i], x_odd);
          }
        }
        const __m512 x_scale = _mm512_set1_ps(x->scale);
        for (int half = 0; half < 2; half++) {
          float* sum = sums[row] + 16 * half;
          const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[half]), x_scale);
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, scale[half], _mm512_loadu_ps(sum)));
        }
      }
    }
    for (size_t row = 0; row < rows; row++)
      memcpy(product->y + (first + row) * matrix->n + column, sums[row], columns * sizeof(float));
  }
}

#define VARIANT(ROWS, BITS, ZEROS)                                                                   \
  TARGET static void ROWS##_##BITS##_##ZEROS(const Product* product, size_t first, size_t columns) { \
    ROWS(product, first, columns, BITS, ZEROS);                                                      \
  }
VARIANT(few_rows, 4, 0)
VARIANT(few_rows, 4, 1)
VARIANT(few_rows, 5, 0)
VARIANT(few_rows, 5, 1)
VARIANT(few_rows, 6, 0)
VARIANT(few_rows, 6, 1)
VARIANT(few_rows, 8, 0)
VARIANT(few_rows, 8, 1)
VARIANT(many_rows, 4, 0)
VARIANT(many_rows, 4, 1)
VARIANT(many_rows, 5, 0)
VARIANT(many_rows, 5, 1)
VARIANT(many_rows, 6, 0)
VARIANT(many_rows, 6, 1)
VARIANT(many_rows, 8, 0)
VARIANT(many_rows, 8, 1)
#define BY_ZEROS(ROWS, BITS) [BITS] = {ROWS##_##BITS##_0, ROWS##_##BITS##_1}
#define BY_WIDTH(ROWS) {BY_ZEROS(ROWS, 4), BY_ZEROS(ROWS, 5), BY_ZEROS(ROWS, 6), BY_ZEROS(ROWS, 8)}
static void (*const VARIANTS[2][9][2])(const Product*, size_t, size_t) = {BY_WIDTH(few_rows), BY_WIDTH(many_rows)};

static size_t columns_of_a_task(const ImsmActivations* activations) { return activations->by_chunk ? TASK : WIDE; }

size_t imsm_product_tasks(const ImsmActivations* activations, size_t n) {
  const size_t columns = columns_of_a_task(activations);
  return (n + columns - 1) / columns;
}

void imsm_product_columns(const ImsmActivations* activations, const ImsmQuantizedMatrix* matrix, float* y, size_t task,
                          size_t* first, size_t* columns) {
  Product product = {.x = activations, .matrix = matrix, .y = y};
  product.per_column = (activations->k + matrix->block_size - 1) / matrix->block_size;
  const size_t inputs = product.per_column * matrix->block_size;
  product.bytes = inputs * (size_t)imsm_stored(activations->bits) / 8;
  product.more_bytes = activations->chunks * IMSM_CHUNK * (size_t)imsm_extra(activations->bits) / 8;
  product.zeros_bytes = activations->bits == 4 ? (product.per_column + 1) / 2 : product.per_column;
  const size_t most = columns_of_a_task(activations);
  *first = task * most;
  *columns = matrix->n - *first < most ? matrix->n - *first : most;
  VARIANTS[activations->by_chunk == NULL][activations->bits][matrix->zeros != NULL](&product, *first, *columns);
}
