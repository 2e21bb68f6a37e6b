"""Weights in int4 and int8: their format, rounding with data (GPTQ), and models that have the rounded values."""
