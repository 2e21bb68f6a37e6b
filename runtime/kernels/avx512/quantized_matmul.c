// QuantizedMatMul: y = x W^T [+ bias] [+ f (x A) B] with W in blocks of int4 or int8.
#include "operators.h"
#include "product_node.h"

enum { X, WEIGHTS, SCALES, ZEROS, BIAS, ROWS, A, B, INPUTS };  // ROWS: the factors f

typedef struct {
  ImsmActivations x;
  ImsmQuantizedMatrix matrix;
  ImsmLowRank change;
  float* y;
} Call;

static void columns_task(void* arguments, size_t task) {
  const Call* call = arguments;
  size_t first, columns;
  imsm_product_columns(&call->x, &call->matrix, call->y, task, &first, &columns);
}

static OrtStatus* compute_call(const ImsmProductKernel* kernel, OrtKernelContext* context, Call* call) {
  const float* x = NULL;
  size_t rows = 0;
  IMSM_TRY(imsm_product_matrix(context, kernel, WEIGHTS, &call->matrix));
  IMSM_TRY(imsm_product_x_and_y(context, kernel, &x, &rows, &call->y));
  if (rows == 0) return NULL;
  IMSM_TRY(imsm_low_rank_begin(&call->change, context, ROWS, A, x, rows, kernel->k, kernel->n));
  if (call->change.low) call->matrix.change = &call->change;
  IMSM_TRY(imsm_activations_begin(&call->x, context, x, rows, kernel->k, kernel->bits));
  return imsm_parallel_for(context, columns_task, imsm_product_tasks(&call->x, kernel->n), call);
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  Call call = {0};
  OrtStatus* status = compute_call(kernel, context, &call);
  imsm_activations_end(&call.x);
  imsm_low_rank_end(&call.change);
  return status;
}

static const ImsmInput inputs[INPUTS] = {
    [X] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [WEIGHTS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    [SCALES] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [ZEROS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, .optional = 1},
    [BIAS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = 1},
    [ROWS] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    [A] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
    [B] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED},
};

const ImsmOperator imsm_quantized_matmul = {"QuantizedMatMul", inputs, ROWS, 1, imsm_product_create, compute};
const ImsmOperator imsm_quantized_matmul_low_rank = {"QuantizedMatMulLowRank", inputs, INPUTS, 1,
                                                     imsm_product_create,      compute};
