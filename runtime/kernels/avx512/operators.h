// The operators, each in the file of its name. Those with a low-rank change take the plain ones' inputs first.
#pragma once

#include "../checks.h"

extern const ImsmOperator imsm_quantized_matmul, imsm_quantized_matmul_low_rank;
extern const ImsmOperator imsm_quantized_swiglu, imsm_quantized_swiglu_low_rank;
extern const ImsmOperator imsm_quantized_gather;
extern const ImsmOperator imsm_group_query_attention;
