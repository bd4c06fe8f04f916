"""Triton kernels for CUDA devices; with ``TRITON_INTERPRET=1`` set before triton is imported, for CPU tensors instead.

The same functions as in :mod:`saerec_fast.kernels.cpu`, each in the file of its name. Arguments are trusted: the public
ops in :mod:`saerec_fast.api` have checked them.
"""
