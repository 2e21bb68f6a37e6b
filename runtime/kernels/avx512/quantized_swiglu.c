// QuantizedSwiGLU: y = silu(x G^T [+ ...]) * (x U^T [+ ...]), both products as in QuantizedMatMul (SwiGLU, arXiv
// 2002.05202).
#include "operators.h"
#include "product_node.h"
#include "vector_math.h"

enum {
  X,
  GATE,
  GATE_SCALES,
  GATE_ZEROS,
  GATE_BIAS,
  UP,
  UP_SCALES,
  UP_ZEROS,
  UP_BIAS,
  ROWS,  // the factors of the low-rank change
  GATE_A,
  GATE_B,
  UP_A,
  UP_B,
  INPUTS
};

typedef struct {
  ImsmActivations x;
  ImsmQuantizedMatrix gate, up;
  ImsmLowRank gate_change, up_change;
  float *y, *other;  // (rows, n)
} Call;

TARGET static void columns_task(void* arguments, size_t task) {
  const Call* call = arguments;
  size_t first, columns;
  imsm_product_columns(&call->x, &call->gate, call->y, task, &first, &columns);
  imsm_product_columns(&call->x, &call->up, call->other, task, &first, &columns);
  for (size_t row = 0; row < call->x.rows; row++) {
    float* gate = call->y + row * call->gate.n + first;
    const float* up = call->other + row * call->gate.n + first;
    for (size_t c = 0; c < columns; c += 16) {
      const __mmask16 lanes = columns - c >= 16 ? 0xffff : (__mmask16)((1u << (columns - c)) - 1);
      const __m512 value =
          _mm512_mul_ps(imsm_silu(_mm512_maskz_loadu_ps(lanes, gate + c)), _mm512_maskz_loadu_ps(lanes, up + c));
      _mm512_mask_storeu_ps(gate + c, lanes, value);
    }
  }
}

static OrtStatus* compute_call(const ImsmProductKernel* kernel, OrtKernelContext* context, Call* call) {
  const size_t k = kernel->k, n = kernel->n;
  const float* x = NULL;
  size_t rows = 0;
  void* other;
  IMSM_TRY(imsm_product_matrix(context, kernel, GATE, &call->gate));
  IMSM_TRY(imsm_product_matrix(context, kernel, UP, &call->up));
  IMSM_TRY(imsm_product_x_and_y(context, kernel, &x, &rows, &call->y));
  if (rows == 0) return NULL;
  IMSM_TRY(imsm_allocate(imsm_times(rows, n), sizeof(float), &other));
  call->other = other;
  IMSM_TRY(imsm_low_rank_begin(&call->gate_change, context, ROWS, GATE_A, x, rows, k, n));
  IMSM_TRY(imsm_low_rank_begin(&call->up_change, context, ROWS, UP_A, x, rows, k, n));
  if (call->gate_change.low) call->gate.change = &call->gate_change;
  if (call->up_change.low) call->up.change = &call->up_change;
  IMSM_TRY(imsm_activations_begin(&call->x, context, x, rows, k, kernel->bits));
  return imsm_parallel_for(context, columns_task, imsm_product_tasks(&call->x, n), call);
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  Call call = {0};
  OrtStatus* status = compute_call(kernel, context, &call);
  imsm_activations_end(&call.x);
  imsm_low_rank_end(&call.gate_change);
  imsm_low_rank_end(&call.up_change);
  free(call.other);
  return status;
}

static const ImsmInput inputs[INPUTS] = {
    [X] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [GATE] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    [GATE_SCALES] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [GATE_ZEROS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, .optional = 1},
    [GATE_BIAS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [UP] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    [UP_SCALES] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [UP_ZEROS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, .optional = 1},
    [UP_BIAS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [ROWS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [GATE_A] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [GATE_B] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [UP_A] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [UP_B] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
};

const ImsmOperator imsm_quantized_swiglu = {"QuantizedSwiGLU", inputs, ROWS, 1, imsm_product_create, compute};
const ImsmOperator imsm_quantized_swiglu_low_rank = {"QuantizedSwiGLULowRank", inputs, INPUTS, 1,
                                                     imsm_product_create,      compute};
