"""From text to text: the tokenizer and chat template, samplers, and the three layers of generation."""
