"""Measuring dense_ext against PyTorch's eager DenseNets: memory and speed.

What ``dense-ext bench``, ``models`` and ``report`` run; needs the packages of ``dense_ext[bench]``.
"""
