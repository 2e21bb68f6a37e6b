"""Every open question about the GPU, answered by one command on a machine that has one for minutes; what is known of
onnxruntime's CUDA provider; and a device to rehearse on where there is no GPU."""
