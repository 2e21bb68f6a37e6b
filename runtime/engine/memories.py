"""The names of what logits can be of, in the order of the graph's input `memory`. Imports without onnxruntime."""

MEMORIES = ("blend", "base", "adapter")
"""The two memories as the gate blends them, and each alone."""
