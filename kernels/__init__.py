"""GPU kernels in Triton, installed as ``sparsekit.kernels``. None yet: CUDA tensors raise NotImplementedError."""
