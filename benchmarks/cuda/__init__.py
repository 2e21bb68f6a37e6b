"""Every open question about the GPU, answered by one command on a machine that has one for minutes."""
