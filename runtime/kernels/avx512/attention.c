// GroupQueryAttention: the operator of com.microsoft for float32 caches that are continued in place, without biases.
//
// The heads that share keys are computed together, so that a cache is read once and not once a head. Softmax is
// computed tile by tile of the cache with a running maximum (FlashAttention, arXiv 2205.14135). A long cache of a
// single new token is divided into parts, whose results are merged by whichever thread finishes last.
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels.h"
#include "vector_math.h"

enum { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, QUERY_SEQLENS };  // inputs
enum {
  LANES = 16,
  TILE = 64,     // positions of the cache
  VECTORS = 32,  // queries (heads of tokens) that a task computes, about
  PART = 512,    // positions of the cache that one task reads for a single new token
  LARGEST_HEAD = 256,
};

typedef struct {
  size_t heads, kv_heads, window;  // window: 0 is none
  float scale;
  int rotary, interleaved;
} Kernel;

typedef struct {
  const Kernel* kernel;
  const float *query, *key, *value;
  size_t query_stride, kv_stride;  // floats from a token to the next
  float *keys, *values;            // caches: (rows, kv_heads, capacity, size)
  const float *cos, *sin;
  size_t half;                    // of the rotated part of a head
  const int32_t *lengths, *news;  // tokens of each row after this step, minus one; new ones (NULL: all)
  float* y;
  size_t rows, tokens, size, capacity, group;
  size_t block, blocks;     // tokens of one task; tasks of a row and a key's head
  size_t parts;             // of the cache
  float* partial;           // (rows, kv_heads, parts, group, size + 2): sums, largest score, sum of weights
  atomic_size_t* finished;  // (rows, kv_heads)
} Call;

static size_t new_tokens(const Call* call, size_t row) { return call->news ? (size_t)call->news[row] : call->tokens; }

static size_t first_position(const Call* call, size_t row) {
  return (size_t)call->lengths[row] + 1 - new_tokens(call, row);
}

// One head at one position, rotated (RoFormer, arXiv 2104.09864) and multiplied.
TARGET static void rotate(const Call* call, const float* from, size_t position, float factor, float* to) {
  const size_t half = call->kernel->rotary ? call->half : 0;
  const float *cos = call->cos + position * half, *sin = call->sin + position * half;
  if (call->kernel->interleaved) {
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
  for (size_t i = 2 * half; i < call->size; i++) to[i] = factor * from[i];
}

static float* cached(const Call* call, float* cache, size_t row, size_t head, size_t position) {
  return cache + ((row * call->kernel->kv_heads + head) * call->capacity + position) * call->size;
}

// New keys and values of one row and head, behind the old ones.
TARGET static void append(const Call* call, size_t row, size_t head) {
  const size_t first = first_position(call, row);
  for (size_t token = 0; token < new_tokens(call, row); token++) {
    const size_t from = (row * call->tokens + token) * call->kv_stride + head * call->size;
    rotate(call, call->key + from, first + token, 1.0f, cached(call, call->keys, row, head, first + token));
    memcpy(cached(call, call->values, row, head, first + token), call->value + from, call->size * sizeof(float));
  }
}

TARGET static void append_task(void* arguments, size_t task) {
  const Call* call = arguments;
  append(call, task / call->kernel->kv_heads, task % call->kernel->kv_heads);
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
    const __mmask16 seen = _mm512_cmp_ps_mask(these, least, _CMP_GT_OQ);
    const __m512 weights = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(these, highest)));
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

// Puts the parts of one row and key's head together.
static void merge(const Call* call, size_t row, size_t kv_head) {
  const size_t width = call->size + 2;
  for (size_t g = 0; g < call->group; g++) {
    const float* parts =
        call->partial + ((row * call->kernel->kv_heads + kv_head) * call->parts * call->group + g) * width;
    float largest = -INFINITY, weight = 0;
    for (size_t part = 0; part < call->parts; part++) {
      const float found = parts[part * call->group * width + call->size];
      if (found > largest) largest = found;
    }
    float* y = call->y + (row * call->kernel->heads + kv_head * call->group + g) * call->size;
    memset(y, 0, call->size * sizeof(float));
    for (size_t part = 0; part < call->parts; part++) {
      const float* these = parts + part * call->group * width;
      if (these[call->size + 1] == 0) continue;
      const float factor = expf(these[call->size] - largest);
      weight += factor * these[call->size + 1];
      for (size_t d = 0; d < call->size; d++) y[d] += factor * these[d];
    }
    for (size_t d = 0; d < call->size; d++) y[d] /= weight;
  }
}

// Some tokens of one row, all heads of one key's head, the whole cache or a part of it.
TARGET static void attend_task(void* arguments, size_t task) {
  const Call* call = arguments;
  const size_t size = call->size, group = call->group, window = call->kernel->window;
  const size_t part = task % call->parts, block = task / call->parts % call->blocks;
  const size_t kv_head = task / call->parts / call->blocks % call->kernel->kv_heads;
  const size_t row = task / call->parts / call->blocks / call->kernel->kv_heads;
  const size_t first = first_position(call, row), start = block * call->block;
  const size_t stop = start + call->block < call->tokens ? start + call->block : call->tokens;
  const size_t there = new_tokens(call, row) < stop ? new_tokens(call, row) : stop;
  for (size_t token = there > start ? there : start; token < stop; token++)  // padding
    memset(call->y + ((row * call->tokens + token) * call->kernel->heads + kv_head * group) * size, 0,
           group * size * sizeof(float));
  if (there <= start && call->parts == 1) return;
  const size_t known = first + there, queries = (there > start ? there - start : 0) * group;
  size_t from = part * PART, end = call->parts > 1 && from + PART < known ? from + PART : known;
  if (call->tokens == 1 && queries > 0 && part == first / PART) append(call, row, kv_head);
  float vectors[queries > 0 ? queries : 1][size] __attribute__((aligned(64)));
  float sums[queries > 0 ? queries : 1][size] __attribute__((aligned(64)));
  State states[queries > 0 ? queries : 1];
  memset(sums, 0, sizeof sums);
  for (size_t i = 0; i < queries; i++) {
    const size_t token = start + i / group, position = first + token;
    rotate(call, call->query + (row * call->tokens + token) * call->query_stride + (kv_head * group + i % group) * size,
           position, call->kernel->scale, vectors[i]);
    states[i] = (State){-INFINITY, 0, window && position + 1 > window ? position + 1 - window : 0, position + 1};
  }
  if (window && first + start + 1 > window && first + start + 1 - window > from)
    from = from + (first + start + 1 - window - from) / TILE * TILE;  // nothing before it is seen
  const float* keys = cached(call, call->keys, row, kv_head, 0);
  const float* values = cached(call, call->values, row, kv_head, 0);
  for (; from < end; from += TILE)
    for (size_t i = 0; i < queries; i++)
      attend(vectors[i], &states[i], sums[i], keys + from * size, values + from * size, from,
             from + TILE < end ? from + TILE : end, size);
  if (call->parts == 1) {
    for (size_t i = 0; i < queries; i++) {
      float* y = call->y +
                 ((row * call->tokens + start + i / group) * call->kernel->heads + kv_head * group + i % group) * size;
      for (size_t d = 0; d < size; d++) y[d] = sums[i][d] / states[i].weight;
    }
    return;
  }
  const size_t place = row * call->kernel->kv_heads + kv_head;
  float* to = call->partial + (place * call->parts + part) * group * (size + 2);
  for (size_t i = 0; i < group; i++, to += size + 2) {
    if (i < queries) memcpy(to, sums[i], size * sizeof(float));
    to[size] = i < queries ? states[i].largest : -INFINITY;
    to[size + 1] = i < queries ? states[i].weight : 0;
  }
  if (atomic_fetch_add(&call->finished[place], 1) + 1 == call->parts && queries > 0) merge(call, row, kv_head);
}

// Copies a cache that is not continued in place.
static void copy_cache(const Call* call, float* to, const float* from, size_t capacity) {
  if (to == from) return;
  for (size_t at = 0; at < call->rows * call->kernel->kv_heads; at++)
    memcpy(to + at * call->capacity * call->size, from + at * capacity * call->size,
           capacity * call->size * sizeof(float));
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel* kernel = op_kernel;
  Call call = {.kernel = kernel};
  size_t width = 0, elements = 0, cached_elements = 0;
  call.query = input(context, QUERY, &elements, &width);
  call.key = input(context, KEY, NULL, NULL);
  call.value = input(context, VALUE, NULL, NULL);
  const float* past_key = input(context, PAST_KEY, &cached_elements, &call.size);
  const float* past_value = input(context, PAST_VALUE, NULL, NULL);
  call.lengths = input(context, SEQLENS_K, &call.rows, NULL);
  const int32_t* total = input(context, TOTAL, NULL, NULL);
  size_t angles = 0;
  call.cos = input(context, COS, &angles, &call.half);
  call.sin = input(context, SIN, NULL, NULL);
  call.news = input(context, QUERY_SEQLENS, NULL, NULL);
  call.group = kernel->heads / kernel->kv_heads;
  const size_t queries_width = kernel->heads * call.size, kv_width = kernel->kv_heads * call.size;
  if (call.size % LANES || call.size > LARGEST_HEAD)
    return failure("GroupQueryAttention: a head size that the kernel has not");
  if (width != queries_width + (call.key ? 0 : 2 * kv_width) || (kernel->rotary && call.cos == NULL))
    return failure("GroupQueryAttention: inputs that do not fit its heads");
  call.query_stride = width;
  call.kv_stride = call.key ? kv_width : width;
  if (call.key == NULL) {
    call.key = call.query + queries_width;
    call.value = call.key + kv_width;
  }
  call.tokens = call.rows ? elements / width / call.rows : 0;
  const size_t capacity = call.rows ? cached_elements / call.rows / kv_width : 0;
  call.capacity = (size_t)*total > capacity ? (size_t)*total : capacity;
  const int64_t y_shape[3] = {(int64_t)call.rows, (int64_t)call.tokens, (int64_t)queries_width};
  const int64_t shape[4] = {(int64_t)call.rows, (int64_t)kernel->kv_heads, (int64_t)call.capacity, (int64_t)call.size};
  call.y = output(context, 0, y_shape, 3);
  call.keys = output(context, 1, shape, 4);
  call.values = output(context, 2, shape, 4);
  if (call.rows == 0 || call.tokens == 0) return NULL;
  copy_cache(&call, call.keys, past_key, capacity);
  copy_cache(&call, call.values, past_value, capacity);
  size_t longest = 0;
  for (size_t row = 0; row < call.rows; row++) {
    const int64_t known = (int64_t)call.lengths[row] + 1, fresh = (int64_t)new_tokens(&call, row);
    if (fresh < 0 || fresh > (int64_t)call.tokens || known < fresh || known > (int64_t)call.capacity)
      return failure("GroupQueryAttention: lengths that do not fit the cache");
    if ((size_t)known > longest) longest = (size_t)known;
  }
  if (kernel->rotary && longest * call.half > angles)
    return failure("GroupQueryAttention: a position past the rotary tables");
  const size_t places = call.rows * kernel->kv_heads;
  call.block = call.group < VECTORS ? VECTORS / call.group : 1;
  if (call.block > call.tokens) call.block = call.tokens;
  call.blocks = (call.tokens + call.block - 1) / call.block;
  call.parts = call.tokens == 1 && longest > PART ? (longest + PART - 1) / PART : 1;
  OrtStatus* status = NULL;
  if (call.tokens > 1) status = parallel_for(context, append_task, places, &call);
  if (status != NULL) return status;
  if (call.parts > 1) {
    const size_t counters = (places * sizeof(atomic_size_t) + 63) / 64 * 64;
    char* memory = malloc(counters + places * call.parts * call.group * (call.size + 2) * sizeof(float));
    if (memory == NULL) return failure("no memory for parts of attention");
    call.finished = (atomic_size_t*)memory;
    call.partial = (float*)(memory + counters);
    for (size_t place = 0; place < places; place++) atomic_init(&call.finished[place], 0);
  }
  status = parallel_for(context, attend_task, places * call.blocks * call.parts, &call);
  free(call.finished);
  return status;
}

static OrtStatus* create(const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) {
  (void)op, (void)ort;
  Kernel* made = malloc(sizeof *made);
  if (made == NULL) return failure("no memory for a kernel");
  made->heads = (size_t)attribute(info, "num_heads", 1);
  made->kv_heads = (size_t)attribute(info, "kv_num_heads", 1);
  const int64_t window = attribute(info, "local_window_size", -1);
  made->window = window > 0 ? (size_t)window : 0;
  made->rotary = (int)attribute(info, "do_rotary", 0);
  made->interleaved = (int)attribute(info, "rotary_interleaved", 0);
  made->scale = float_attribute(info, "scale", 1.0f);
  *kernel = made;
  return NULL;
}

static const char* name(const OrtCustomOp* op) { return (void)op, "GroupQueryAttention"; }
static size_t inputs(const OrtCustomOp* op) { return (void)op, QUERY_SEQLENS + 1; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, 3; }
static ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  (void)op;
  return index == SEQLENS_K || index == TOTAL || index == QUERY_SEQLENS ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                                                                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp* op, size_t index) {
  (void)op;
  return index == KEY || index == VALUE || index == COS || index == SIN ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

const OrtCustomOp* group_query_attention(void) {
  static const OrtCustomOp op = OPERATOR(name, inputs, outputs, input_type, input_characteristic, create, compute);
  return &op;
}
