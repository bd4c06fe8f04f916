"""From tensors to kernels, one module per kind of device."""
