"""The runtime's own commands, a file each. None of them needs PyTorch."""
