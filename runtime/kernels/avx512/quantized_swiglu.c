// QuantizedSwiGLU: y = silu(x G^T [+ ...]) * (x U^T [+ ...]), both products as in QuantizedMatMul (SwiGLU, arXiv
// 2002.05202).
#include "operators.h"
#include "product_node.h"
#include "vector_math.h"

// Inputs; the two forms differ from MORE and ROWS on, the factors of the low-rank change.
enum { X, GATE, UP = GATE + IMSM_MATRIX, MORE = UP + IMSM_MATRIX, INPUTS = MORE + 2 };
enum {
  ROWS = UP + IMSM_MATRIX,
  GATE_A,
  UP_A = GATE_A + IMSM_CHANGE,
  CHANGED_MORE = UP_A + IMSM_CHANGE,
  CHANGED_INPUTS = CHANGED_MORE + 2
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
  ImsmInputs inputs = imsm_product_inputs(kernel, context);
  ImsmTensor x;
  void* other;
  IMSM_TRY(imsm_read(&inputs, X, &x));
  const size_t rows = inputs.sizes[IMSM_ROWS];
  const int changed = kernel->operator == &imsm_quantized_swiglu_low_rank;
  const size_t more = changed ? CHANGED_MORE : MORE;
  IMSM_TRY(imsm_product_matrix(&inputs, kernel, GATE, more, &call->gate));
  IMSM_TRY(imsm_product_matrix(&inputs, kernel, UP, more + 1, &call->up));
  if (changed) {
    IMSM_TRY(imsm_low_rank_begin(&call->gate_change, &inputs, ROWS, GATE_A, x.data, rows, k, n));
    IMSM_TRY(imsm_low_rank_begin(&call->up_change, &inputs, ROWS, UP_A, x.data, rows, k, n));
    call->gate.change = &call->gate_change;
    call->up.change = &call->up_change;
  }
  IMSM_TRY(imsm_product_y(context, kernel, &x, &call->y));
  if (rows == 0) return NULL;
  IMSM_TRY(imsm_allocate(imsm_times(rows, n), sizeof(float), &other));
  call->other = other;
  IMSM_TRY(imsm_activations_begin(&call->x, context, x.data, rows, k, kernel->bits));
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
    IMSM_X_INPUT(X),
    IMSM_MATRIX_INPUTS(GATE, "gate_"),
    IMSM_MATRIX_INPUTS(UP, "up_"),
    IMSM_MORE_INPUT(MORE, "gate_"),
    IMSM_MORE_INPUT(MORE + 1, "up_"),
};
static const ImsmInput changed_inputs[CHANGED_INPUTS] = {
    IMSM_X_INPUT(X),
    IMSM_MATRIX_INPUTS(GATE, "gate_"),
    IMSM_MATRIX_INPUTS(UP, "up_"),
    IMSM_FACTORS_INPUT(ROWS),
    IMSM_CHANGE_INPUTS(GATE_A, "gate_", IMSM_RANK),
    IMSM_CHANGE_INPUTS(UP_A, "up_", IMSM_OTHER_RANK),
    IMSM_MORE_INPUT(CHANGED_MORE, "gate_"),
    IMSM_MORE_INPUT(CHANGED_MORE + 1, "up_"),
};

const ImsmOperator imsm_quantized_swiglu = IMSM_PRODUCT_OPERATOR("QuantizedSwiGLU", inputs, INPUTS, compute);
const ImsmOperator imsm_quantized_swiglu_low_rank =
    IMSM_PRODUCT_OPERATOR("QuantizedSwiGLULowRank", changed_inputs, CHANGED_INPUTS, compute);
