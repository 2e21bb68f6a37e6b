"""Whether a written graph computes what PyTorch computes, and how good a quantized one is."""
