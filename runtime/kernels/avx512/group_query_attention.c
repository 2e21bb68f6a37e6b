// GroupQueryAttention: the operator of com.microsoft for float32 caches that are continued in place, without biases.
#include <string.h>

#include "attention.h"
#include "operators.h"

enum { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, QUERY_SEQLENS, INPUTS };
enum { Y, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

typedef struct {
  size_t heads, kv_heads, window;
  float scale;
  int rotary, interleaved;
} Kernel;

static const char NAME[] = "GroupQueryAttention";

static OrtStatus* read_heads(const OrtKernelInfo* info, const char* name, size_t* heads) {
  int64_t value = 0;
  IMSM_TRY(imsm_int_attribute(info, name, 1, &value));
  if (value < 1 || value > INT32_MAX)
    return imsm_failure("%s: %s is %lld; it must be 1 to %d", NAME, name, (long long)value, INT32_MAX);
  *heads = (size_t)value;
  return NULL;
}

static OrtStatus* read_attributes(const OrtKernelInfo* info, Kernel* kernel) {
  int64_t window = 0, rotary = 0, interleaved = 0;
  IMSM_TRY(read_heads(info, "num_heads", &kernel->heads));
  IMSM_TRY(read_heads(info, "kv_num_heads", &kernel->kv_heads));
  IMSM_TRY(imsm_int_attribute(info, "local_window_size", -1, &window));
  IMSM_TRY(imsm_int_attribute(info, "do_rotary", 0, &rotary));
  IMSM_TRY(imsm_int_attribute(info, "rotary_interleaved", 0, &interleaved));
  IMSM_TRY(imsm_float_attribute(info, "scale", 1.0f, &kernel->scale));
  if (kernel->heads % kernel->kv_heads)
    return imsm_failure("%s: num_heads %zu is not a multiple of kv_num_heads %zu", NAME, kernel->heads,
                        kernel->kv_heads);
  if (kernel->heads / kernel->kv_heads > IMSM_LARGEST_GROUP)
    return imsm_failure("%s: %zu heads share a key; at most %d may", NAME, kernel->heads / kernel->kv_heads,
                        IMSM_LARGEST_GROUP);
  kernel->window = window > 0 ? (size_t)window : 0;
  kernel->rotary = rotary != 0;
  kernel->interleaved = interleaved != 0;
  return NULL;
}

static OrtStatus* create(const ImsmOperator* operator, const OrtKernelInfo* info, void** kernel) {
  (void)operator;
  Kernel found = {0};
  IMSM_TRY(read_attributes(info, &found));
  IMSM_TRY(imsm_allocate(1, sizeof found, kernel));
  *(Kernel*)*kernel = found;
  return NULL;
}

// The old caches: how many rows there are, the size of a head, and whether the kernel supports that size.
static OrtStatus* read_caches(const OrtKernelContext* context, ImsmAttention* to, ImsmTensor* key, ImsmTensor* value) {
  IMSM_TRY(imsm_input(context, PAST_KEY, key));
  IMSM_TRY(imsm_input(context, PAST_VALUE, value));
  if (key->dimensions != 4 || key->shape[1] != to->kv_heads)
    return imsm_failure("%s: past_key is not (rows, %zu, positions, head size)", NAME, to->kv_heads);
  if (value->dimensions != 4 || memcmp(key->shape, value->shape, sizeof key->shape) != 0)
    return imsm_failure("%s: past_key and past_value differ in shape", NAME);
  to->rows = key->shape[0];
  to->size = key->shape[3];
  if (to->size == 0 || to->size % IMSM_HEAD_STEP || to->size > IMSM_LARGEST_HEAD)
    return imsm_failure("%s: the head size is %zu; it must be a multiple of %d up to %d", NAME, to->size,
                        IMSM_HEAD_STEP, IMSM_LARGEST_HEAD);
  return NULL;
}

// The new tokens: queries, keys and values apart, or all in one tensor.
static OrtStatus* read_tokens(const OrtKernelContext* context, ImsmAttention* to) {
  ImsmTensor query, key, value;
  IMSM_TRY(imsm_input(context, QUERY, &query));
  IMSM_TRY(imsm_optional_input(context, KEY, &key));
  IMSM_TRY(imsm_optional_input(context, VALUE, &value));
  if (key.given != value.given) return imsm_failure("%s: one of key and value is missing", NAME);
  const size_t kv_width = to->kv_heads * to->size, queries_width = to->heads * to->size;
  const size_t width = queries_width + (key.given ? 0 : 2 * kv_width);
  if (query.dimensions != 3 || query.shape[0] != to->rows || query.shape[2] != width)
    return imsm_failure("%s: query is not (%zu, tokens, %zu)", NAME, to->rows, width);
  to->tokens = query.shape[1];
  to->query = query.data;
  to->query_stride = width;
  if (!key.given) {
    to->key = to->query + queries_width;
    to->value = to->key + kv_width;
    to->kv_stride = width;
    return NULL;
  }
  const size_t shape[IMSM_MOST_DIMENSIONS] = {to->rows, to->tokens, kv_width};
  if (key.dimensions != 3 || memcmp(key.shape, shape, sizeof shape) != 0)
    return imsm_failure("%s: key is not (%zu, %zu, %zu)", NAME, to->rows, to->tokens, kv_width);
  if (value.dimensions != 3 || memcmp(value.shape, shape, sizeof shape) != 0)
    return imsm_failure("%s: value is not (%zu, %zu, %zu)", NAME, to->rows, to->tokens, kv_width);
  to->key = key.data;
  to->value = value.data;
  to->kv_stride = kv_width;
  return NULL;
}

// The rotary tables; `positions` is how many they have.
static OrtStatus* read_tables(const OrtKernelContext* context, ImsmAttention* to, size_t* positions) {
  ImsmTensor cos, sin;
  IMSM_TRY(imsm_input(context, COS, &cos));
  IMSM_TRY(imsm_input(context, SIN, &sin));
  if (cos.dimensions != 2 || 2 * cos.shape[1] > to->size)
    return imsm_failure("%s: cos is not (positions, at most half of the head size %zu)", NAME, to->size);
  if (sin.dimensions != 2 || memcmp(cos.shape, sin.shape, sizeof cos.shape) != 0)
    return imsm_failure("%s: cos and sin differ in shape", NAME);
  to->cos = cos.data;
  to->sin = sin.data;
  to->half = cos.shape[1];
  *positions = cos.shape[0];
  return NULL;
}

// How many tokens each row has after this step and how many of them are new; the caches grow to `total` if they are
// shorter. `positions` is how many the rotary tables have.
static OrtStatus* read_lengths(const OrtKernelContext* context, ImsmAttention* to, size_t past, size_t positions) {
  ImsmTensor lengths, news, total;
  IMSM_TRY(imsm_input(context, SEQLENS_K, &lengths));
  IMSM_TRY(imsm_input(context, TOTAL, &total));
  IMSM_TRY(imsm_input(context, QUERY_SEQLENS, &news));
  if (lengths.count != to->rows || news.count != to->rows)
    return imsm_failure("%s: there are %zu seqlens_k and %zu query_seqlens for %zu rows", NAME, lengths.count,
                        news.count, to->rows);
  if (total.count != 1) return imsm_failure("%s: total has %zu elements instead of 1", NAME, total.count);
  const int32_t wanted = *(const int32_t*)total.data;
  if (wanted < 0) return imsm_failure("%s: total is %d", NAME, wanted);
  to->lengths = lengths.data;
  to->news = news.data;
  to->capacity = (size_t)wanted > past ? (size_t)wanted : past;
  for (size_t row = 0; row < to->rows; row++) {
    const int64_t known = (int64_t)to->lengths[row] + 1, fresh = to->news[row];
    if (fresh < 0 || fresh > (int64_t)to->tokens || known < fresh || known > (int64_t)to->capacity)
      return imsm_failure("%s: row %zu has %lld tokens, %lld of them new; the step has %zu and the cache holds %zu",
                          NAME, row, (long long)known, (long long)fresh, to->tokens, to->capacity);
    if (to->rotary && (size_t)known > positions)
      return imsm_failure("%s: row %zu has %lld tokens, but the rotary tables end at %zu", NAME, row, (long long)known,
                          positions);
  }
  return NULL;
}

// Copies a cache that is not continued in place.
static void copy_cache(const ImsmAttention* call, float* to, const ImsmTensor* past) {
  const size_t floats = past->shape[2] * call->size;
  if (to == past->data || floats == 0) return;
  for (size_t at = 0; at < call->rows * call->kv_heads; at++)
    memcpy(to + at * call->capacity * call->size, (const float*)past->data + at * floats, floats * sizeof(float));
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel* kernel = op_kernel;
  ImsmAttention call = {.heads = kernel->heads,
                        .kv_heads = kernel->kv_heads,
                        .group = kernel->heads / kernel->kv_heads,
                        .window = kernel->window,
                        .scale = kernel->scale,
                        .rotary = kernel->rotary,
                        .interleaved = kernel->interleaved};
  ImsmTensor past_key, past_value;
  size_t positions = 0;
  IMSM_TRY(read_caches(context, &call, &past_key, &past_value));
  IMSM_TRY(read_tokens(context, &call));
  if (call.rotary) IMSM_TRY(read_tables(context, &call, &positions));
  IMSM_TRY(read_lengths(context, &call, past_key.shape[2], positions));
  const size_t y_shape[3] = {call.rows, call.tokens, call.heads * call.size};
  const size_t shape[4] = {call.rows, call.kv_heads, call.capacity, call.size};
  IMSM_TRY(imsm_output(context, Y, y_shape, 3, &call.y));
  IMSM_TRY(imsm_output(context, PRESENT_KEY, shape, 4, &call.keys));
  IMSM_TRY(imsm_output(context, PRESENT_VALUE, shape, 4, &call.values));
  copy_cache(&call, call.keys, &past_key);
  copy_cache(&call, call.values, &past_value);
  return call.rows && call.tokens ? imsm_attention(&call, context) : NULL;
}

static const ImsmInput inputs[INPUTS] = {
    [QUERY] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [KEY] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [VALUE] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [PAST_KEY] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [PAST_VALUE] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [SEQLENS_K] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    [TOTAL] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    [COS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [SIN] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [QUERY_SEQLENS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
};

const ImsmOperator imsm_group_query_attention = {"GroupQueryAttention", inputs, INPUTS, OUTPUTS, create, compute};
