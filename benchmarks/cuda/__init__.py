"""What is known of onnxruntime's CUDA provider, and a device to rehearse it on where there is no GPU."""
