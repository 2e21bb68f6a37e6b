// The heads that share keys are computed together, so that a cache is read once and not once per head. Softmax is
// computed tile by tile of the cache with a running maximum (FlashAttention, arXiv 2205.14135). A long cache of a
// single new token is divided into parts, whose results are merged by whichever thread finishes last.
#include "attention.h"

#include <math.h>
#include <string.h>

#include "target.h"
#include "vector_math.h"

enum {
  LANES = IMSM_HEAD_STEP,
  TILE = 64,     // positions of the cache
  VECTORS = 32,  // queries (heads of tokens) that a task computes, about
  PART = 512,    // positions of the cache that one task reads for a single new token
};

static size_t new_tokens(const ImsmAttention* attention, size_t row) { return (size_t)attention->news[row]; }

static size_t first_position(const ImsmAttention* attention, size_t row) {
  return (size_t)attention->lengths[row] + 1 - new_tokens(attention, row);
}

// One head at one position, rotated (RoFormer, arXiv 2104.09864) and multiplied.
TARGET static void rotate(const ImsmAttention* attention, const float* from, size_t position, float factor, float* to) {
  const size_t half = attention->rotary ? attention->half : 0;
  const float *cos = attention->cos + position * half, *sin = attention->sin + position * half;
  if (attention->interleaved) {
    for (size_t i = 0; i < half; i++) {
      to[2 * i] = factor * (from[2 * i] * cos[i] - from[2 * i + 1] * sin[i]);
      to[2 * i + 1] = factor * (from[2 * i] * sin[i] + from[2 * i + 1] * cos[i]);
    }
  } else {
    for (size_t i = 0; i < half; i++) {
      to[i] = factor * (from[i] * cos[i] - from[i + half] * sin[i]);
      to[i + half] = factor * (from[i] * sin[i] + from[i + half] * cos[i]);
    }
  }
  for (size_t i = 2 * half; i < attention->size; i++) to[i] = factor * from[i];
}

static float* cached(const ImsmAttention* attention, float* cache, size_t row, size_t head, size_t position) {
  return cache + ((row * attention->kv_heads + head) * attention->capacity + position) * attention->size;
}

// New keys and values of one row and head, behind the old ones.
TARGET static void append(const ImsmAttention* attention, size_t row, size_t head) {
  const size_t first = first_position(attention, row);
  for (size_t token = 0; token < new_tokens(attention, row); token++) {
    const size_t from = (row * attention->tokens + token) * attention->kv_stride + head * attention->size;
    rotate(attention, attention->key + from, first + token, 1.0f,
           cached(attention, attention->keys, row, head, first + token));
    memcpy(cached(attention, attention->values, row, head, first + token), attention->value + from,
           attention->size * sizeof(float));
  }
}

TARGET static void append_task(void* arguments, size_t task) {
  const ImsmAttention* attention = arguments;
  append(attention, task / attention->kv_heads, task % attention->kv_heads);
}

// The sums of four registers.
TARGET static inline __m128 sums_of_four(const __m512 x[4]) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// What is known of one query's softmax so far.
typedef struct {
  float largest, weight;
  size_t begin, end;  // positions of the cache that it sees
} State;

// One query and one tile of the cache, positions [start, start + TILE).
TARGET static void attend(const float* query, State* state, float* sums, const float* keys, const float* values,
                          size_t start, size_t end, size_t size) {
  const size_t from = state->begin > start ? state->begin - start : 0;
  const size_t to = state->end < end ? state->end - start : end - start;
  if (state->end <= start || from >= to) return;
  float scores[TILE] __attribute__((aligned(64)));
  const size_t whole = from / 4 * 4;
  for (size_t t = whole; t < to; t += 4) {
    __m512 dots[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const float* rows[4];
    for (size_t i = 0; i < 4; i++) rows[i] = keys + (t + i < to ? t + i : to - 1) * size;
    for (size_t d = 0; d < size; d += LANES) {
      const __m512 q = _mm512_loadu_ps(query + d);
      for (int i = 0; i < 4; i++) dots[i] = _mm512_fmadd_ps(q, _mm512_loadu_ps(rows[i] + d), dots[i]);
    }
    _mm_store_ps(scores + t, sums_of_four(dots));
  }
  for (size_t t = whole; t < from; t++) scores[t] = -INFINITY;
  __m512 most = _mm512_set1_ps(state->largest);
  const __m512 least = _mm512_set1_ps(-INFINITY);
  for (size_t t = whole / LANES * LANES; t < to; t += LANES) {
    const __mmask16 lanes = (__mmask16)((to - t >= LANES ? 0xffffu : (1u << (to - t)) - 1) &
                                        (t < whole ? 0xffffu << (whole - t) : 0xffffu));
    const __m512 these = _mm512_mask_loadu_ps(least, lanes, scores + t);
    _mm512_store_ps(scores + t, these);
    most = _mm512_max_ps(most, these);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 highest = _mm512_set1_ps(largest);
  __m512 weight = _mm512_setzero_ps();
  for (size_t t = whole / LANES * LANES; t < to; t += LANES) {
    const __m512 these = _mm512_load_ps(scores + t);
    const __mmask16 seen = _mm512_cmp_ps_mask(these, least, _CMP_NLE_UQ);  // not a number is seen
    const __m512 weights = _mm512_maskz_mov_ps(seen, imsm_exponential(_mm512_sub_ps(these, highest)));
    _mm512_store_ps(scores + t, weights);
    weight = _mm512_add_ps(weight, weights);
  }
  const float fade = state->weight > 0 ? expf(state->largest - largest) : 0.0f;
  state->largest = largest;
  state->weight = state->weight * fade + _mm512_reduce_add_ps(weight);
  for (size_t d = 0; d < size; d += 4 * LANES) {
    const size_t registers = size - d >= 4 * LANES ? 4 : (size - d) / LANES;
    __m512 all[4];
    for (size_t i = 0; i < registers; i++)
      all[i] = _mm512_mul_ps(_mm512_loadu_ps(sums + d + i * LANES), _mm512_set1_ps(fade));
    if (registers == 4) {
      for (size_t t = from; t < to; t++)
        for (int i = 0; i < 4; i++)
          all[i] =
              _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), _mm512_loadu_ps(values + t * size + d + i * LANES), all[i]);
    } else {
      for (size_t t = from; t < to; t++)
        for (size_t i = 0; i < registers; i++)
          all[i] =
              _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), _mm512_loadu_ps(values + t * size + d + i * LANES), all[i]);
    }
    for (size_t i = 0; i < registers; i++) _mm512_storeu_ps(sums + d + i * LANES, all[i]);
  }
}

// What a part of the cache gives for a query of a key head: sums, largest score, sum of weights.
static float* partial(const ImsmAttention* attention, size_t row, size_t kv_head, size_t part, size_t query) {
  const size_t place = (row * attention->kv_heads + kv_head) * attention->parts + part;
  return attention->partial + (place * attention->group + query) * (attention->size + 2);
}

// Merges the parts of one row and key head.
static void merge(const ImsmAttention* attention, size_t row, size_t kv_head) {
  const size_t size = attention->size;
  for (size_t g = 0; g < attention->group; g++) {
    float largest = -INFINITY, weight = 0;
    for (size_t part = 0; part < attention->parts; part++) {
      const float found = partial(attention, row, kv_head, part, g)[size];
      if (found > largest) largest = found;
    }
    float* y = attention->y + (row * attention->heads + kv_head * attention->group + g) * size;
    memset(y, 0, size * sizeof(float));
    for (size_t part = 0; part < attention->parts; part++) {
      const float* these = partial(attention, row, kv_head, part, g);
      if (these[size + 1] == 0) continue;
      const float factor = expf(these[size] - largest);
      weight += factor * these[size + 1];
      for (size_t d = 0; d < size; d++) y[d] += factor * these[d];
    }
    for (size_t d = 0; d < size; d++) y[d] /= weight;
  }
}

// A task: some tokens of one row, all heads that share a key head, the whole cache or a part of it.
typedef struct {
  size_t row, kv_head, part;
  size_t start, first;  // the first of the tokens: of the new ones, and as a position
  size_t from, end;     // positions of the cache
} Task;

static float* result(const ImsmAttention* attention, const Task* task, size_t query) {
  const size_t token = task->start + query / attention->group;
  const size_t head = task->kv_head * attention->group + query % attention->group;
  return attention->y + ((task->row * attention->tokens + token) * attention->heads + head) * attention->size;
}

// Queries [query, query + count) of a task, VECTORS at most.
TARGET static void attend_queries(const ImsmAttention* attention, const Task* task, size_t query, size_t count) {
  const size_t size = attention->size, group = attention->group, window = attention->window;
  // As small as the call allows, and 32 KB each at most, because a thread's stack may be small, and because arrays of
  // the largest size would lie a multiple of 4 KB apart, where a processor may take a load for one that depends on an
  // earlier store.
  float vectors[count][size] __attribute__((aligned(64)));
  float sums[count][size] __attribute__((aligned(64)));
  State states[count];
  memset(sums, 0, sizeof sums);
  for (size_t i = 0; i < count; i++) {
    const size_t token = (query + i) / group, position = task->first + token;
    rotate(attention,
           attention->query + (task->row * attention->tokens + task->start + token) * attention->query_stride +
               (task->kv_head * group + (query + i) % group) * size,
           position, attention->scale, vectors[i]);
    states[i] = (State){-INFINITY, 0, window && position + 1 > window ? position + 1 - window : 0, position + 1};
  }
  size_t from = task->from;
  const size_t seen = window && task->first + 1 > window ? task->first + 1 - window : 0;
  if (seen > from) from += (seen - from) / TILE * TILE;  // nothing before it is seen
  const float* keys = cached(attention, attention->keys, task->row, task->kv_head, 0);
  const float* values = cached(attention, attention->values, task->row, task->kv_head, 0);
  for (; from < task->end; from += TILE)
    for (size_t i = 0; i < count; i++)
      attend(vectors[i], &states[i], sums[i], keys + from * size, values + from * size, from,
             from + TILE < task->end ? from + TILE : task->end, size);
  if (attention->parts == 1) {
    for (size_t i = 0; i < count; i++) {
      float* y = result(attention, task, query + i);
      for (size_t d = 0; d < size; d++) y[d] = sums[i][d] / states[i].weight;
    }
    return;
  }
  float* to = partial(attention, task->row, task->kv_head, task->part, query);
  for (size_t i = 0; i < count; i++, to += size + 2) {
    memcpy(to, sums[i], size * sizeof(float));
    to[size] = states[i].largest;
    to[size + 1] = states[i].weight;
  }
}

TARGET static void attend_task(void* arguments, size_t number) {
  const ImsmAttention* attention = arguments;
  const size_t group = attention->group, parts = attention->parts;
  Task task = {.part = number % parts,
               .start = number / parts % attention->blocks * attention->block,
               .kv_head = number / parts / attention->blocks % attention->kv_heads,
               .row = number / parts / attention->blocks / attention->kv_heads};
  const size_t first = first_position(attention, task.row), news = new_tokens(attention, task.row);
  const size_t last =
      task.start + attention->block < attention->tokens ? task.start + attention->block : attention->tokens;
  const size_t there = news < task.start ? task.start : news < last ? news : last;  // behind it is padding
  const size_t queries = (there - task.start) * group;
  for (size_t query = queries; task.part == 0 && query < (last - task.start) * group; query++)
    memset(result(attention, &task, query), 0, attention->size * sizeof(float));
  if (queries == 0) return;
  task.first = first + task.start;
  task.from = task.part * PART;
  task.end = parts > 1 && task.from + PART < first + there ? task.from + PART : first + there;
  if (attention->tokens == 1 && task.part == first / PART) append(attention, task.row, task.kv_head);
  for (size_t query = 0; query < queries; query += VECTORS)
    attend_queries(attention, &task, query, queries - query < VECTORS ? queries - query : VECTORS);
  const size_t place = task.row * attention->kv_heads + task.kv_head;
  if (parts > 1 && atomic_fetch_add(&attention->finished[place], 1) + 1 == parts)
    merge(attention, task.row, task.kv_head);
}

OrtStatus* imsm_attention(ImsmAttention* attention, const OrtKernelContext* context) {
  const size_t places = attention->rows * attention->kv_heads;
  size_t longest = 0;
  for (size_t row = 0; row < attention->rows; row++) {
    const size_t known = (size_t)attention->lengths[row] + 1;
    if (known > longest) longest = known;
  }
  attention->block = attention->group < VECTORS ? VECTORS / attention->group : 1;
  if (attention->block > attention->tokens) attention->block = attention->tokens;
  attention->blocks = (attention->tokens + attention->block - 1) / attention->block;
  attention->parts = attention->tokens == 1 && longest > PART ? (longest + PART - 1) / PART : 1;
  if (attention->tokens > 1) IMSM_TRY(imsm_parallel_for(context, append_task, places, attention));
  void* memory = NULL;
  if (attention->parts > 1) {
    const size_t counters = (places * sizeof(atomic_size_t) + 63) / 64 * 64;
    const size_t partial = imsm_times(imsm_times(places * attention->parts, attention->group), attention->size + 2);
    if (partial > (SIZE_MAX - counters) / sizeof(float)) return imsm_failure("the cache is too large");
    IMSM_TRY(imsm_allocate(counters + partial * sizeof(float), 1, &memory));
    attention->finished = memory;
    attention->partial = (float*)((char*)memory + counters);
    for (size_t place = 0; place < places; place++) atomic_init(&attention->finished[place], 0);
  }
  OrtStatus* status = imsm_parallel_for(context, attend_task, places * attention->blocks * attention->parts, attention);
  free(memory);
  return status;
}
