"""CUDA libraries that compute nothing, with which onnxruntime-gpu's CUDA provider starts without a GPU."""
