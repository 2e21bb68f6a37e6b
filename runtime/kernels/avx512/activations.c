#include "activations.h"

#include "target.h"

// Rounds up to 32 floats; returns their scale, which is not a number if one of them is none, and infinite if one of
// them is: their products are then no numbers. Sums are of rounded values.
TARGET static float round_block(const float* x, size_t count, int bits, int8_t* even, int8_t* odd, int32_t* lane_sums) {
  const __mmask16 low = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
  const __mmask16 high = count >= 32 ? 0xffff : count <= 16 ? 0 : (__mmask16)((1u << (count - 16)) - 1);
  const __m512 a = _mm512_maskz_loadu_ps(low, x), b = _mm512_maskz_loadu_ps(high, x + 16);
  // The bits of floats without a sign are ordered as they are; what is not a number has the largest.
  const __m512i bits_a = _mm512_castps_si512(_mm512_abs_ps(a)), bits_b = _mm512_castps_si512(_mm512_abs_ps(b));
  const __m128i largest_bits = _mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_max_epi32(bits_a, bits_b)));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(largest_bits));
  const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, factor)));
  const __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, factor)));
  const __m256i all = _mm256_set_m128i(second, first);
  // Bytes 0, 2, 4, ... and 1, 3, 5, ...
  const __m256i pairs =
      bits == 8 ? all
                : _mm256_permute4x64_epi64(
                      _mm256_shuffle_epi8(all, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0,
                                                                2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)),
                      0xd8);
  const __m128i evens = _mm256_castsi256_si128(pairs), odds = _mm256_extracti128_si256(pairs, 1);
  _mm_storeu_si128((__m128i*)even, evens);
  _mm_storeu_si128((__m128i*)odd, odds);
  const __m128i ones = _mm_set1_epi8(1);
  const __m128i sums = _mm_dpbusd_epi32(_mm_dpbusd_epi32(_mm_setzero_si128(), ones, evens), ones, odds);
  _mm_storeu_si128((__m128i*)lane_sums, sums);
  return largest / 127.0f;
}

TARGET static void round_by_chunk(const ImsmActivations* activations, size_t row) {
  const size_t k = activations->k;
  for (size_t chunk = 0; chunk < activations->chunks; chunk++) {
    ImsmChunk* to = activations->by_chunk + row * activations->chunks + chunk;
    for (size_t block = 0; block < IMSM_CHUNK / IMSM_BLOCK; block++) {
      const size_t start = chunk * IMSM_CHUNK + block * IMSM_BLOCK;
      const size_t count = start >= k ? 0 : k - start < IMSM_BLOCK ? k - start : IMSM_BLOCK;
      int32_t sums[4];
      const float scale = round_block(activations->x + row * k + start, count, activations->bits, to->even + 16 * block,
                                      to->odd + 16 * block, sums);
      for (int lane = 0; lane < 4; lane++) {
        to->start[4 * block + lane] = -sums[lane] * (1 << imsm_middle(activations->bits));
        to->scale[4 * block + lane] = scale;
      }
    }
  }
}

TARGET static void round_by_block(void* arguments, size_t row) {
  const ImsmActivations* activations = arguments;
  const size_t k = activations->k;
  for (size_t block = 0; block < activations->blocks; block++) {
    ImsmBlock* to = activations->by_block + block * activations->rows + row;
    const size_t start = block * IMSM_BLOCK, count = k - start < IMSM_BLOCK ? k - start : IMSM_BLOCK;
    int32_t sums[4];
    to->scale = round_block(activations->x + row * k + start, count, activations->bits, to->even, to->odd, sums);
    to->start = -(sums[0] + sums[1] + sums[2] + sums[3]) * (1 << imsm_middle(activations->bits));
  }
}

OrtStatus* imsm_activations_begin(ImsmActivations* activations, const OrtKernelContext* context, const float* x,
                                  size_t rows, size_t k, int bits) {
  *activations = (ImsmActivations){.x = x, .rows = rows, .k = k, .bits = bits};
  activations->blocks = (k + IMSM_BLOCK - 1) / IMSM_BLOCK;
  activations->chunks = (k + IMSM_CHUNK - 1) / IMSM_CHUNK;
  void* rounded;
  if (rows <= IMSM_FEW) {
    IMSM_TRY(imsm_allocate(imsm_times(rows, activations->chunks), sizeof(ImsmChunk), &rounded));
    activations->by_chunk = rounded;
    for (size_t row = 0; row < rows; row++) round_by_chunk(activations, row);
    return NULL;
  }
  IMSM_TRY(imsm_allocate(imsm_times(rows, activations->blocks), sizeof(ImsmBlock), &rounded));
  activations->by_block = rounded;
  return imsm_parallel_for(context, round_by_block, rows, activations);
}

void imsm_activations_end(ImsmActivations* activations) {
  free(activations->by_chunk);
  free(activations->by_block);
}
