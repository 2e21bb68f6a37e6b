// QuantizedMatMul: y = x W^T [+ bias] [+ f (x A) B] with W in blocks of 4, 5, 6 or 8 bits.
#include "operators.h"
#include "product_node.h"

// Inputs; the two forms differ from MORE and ROWS on, the factors f.
enum { X, WEIGHTS, MORE = WEIGHTS + IMSM_MATRIX, INPUTS };
enum { ROWS = WEIGHTS + IMSM_MATRIX, A, CHANGED_MORE = A + IMSM_CHANGE, CHANGED_INPUTS };

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
  ImsmInputs inputs = imsm_product_inputs(kernel, context);
  ImsmTensor x;
  IMSM_TRY(imsm_read(&inputs, X, &x));
  const size_t rows = inputs.sizes[IMSM_ROWS];
  const int changed = kernel->operator == &imsm_quantized_matmul_low_rank;
  IMSM_TRY(imsm_product_matrix(&inputs, kernel, WEIGHTS, changed ? CHANGED_MORE : MORE, &call->matrix));
  if (changed) {
    IMSM_TRY(imsm_low_rank_begin(&call->change, &inputs, ROWS, A, x.data, rows, kernel->k, kernel->n));
    call->matrix.change = &call->change;
  }
  IMSM_TRY(imsm_product_y(context, kernel, &x, &call->y));
  if (rows == 0) return NULL;
  IMSM_TRY(imsm_activations_begin(&call->x, context, x.data, rows, kernel->k, kernel->bits));
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
    IMSM_X_INPUT(X),
    IMSM_MATRIX_INPUTS(WEIGHTS, ""),
    IMSM_MORE_INPUT(MORE, ""),
};
static const ImsmInput changed_inputs[CHANGED_INPUTS] = {
    IMSM_X_INPUT(X),
    IMSM_MATRIX_INPUTS(WEIGHTS, ""),
    IMSM_FACTORS_INPUT(ROWS),
    IMSM_CHANGE_INPUTS(A, "", IMSM_RANK),
    IMSM_MORE_INPUT(CHANGED_MORE, ""),
};

const ImsmOperator imsm_quantized_matmul = IMSM_PRODUCT_OPERATOR("QuantizedMatMul", inputs, INPUTS, compute);
const ImsmOperator imsm_quantized_matmul_low_rank =
    IMSM_PRODUCT_OPERATOR("QuantizedMatMulLowRank", changed_inputs, CHANGED_INPUTS, compute);
