"""Measuring dense_ext against PyTorch's eager DenseNets: memory, speed, accuracy.

What ``dense-ext bench``, ``models``, ``train`` and ``report`` run; needs the packages of
``dense_ext[bench]``.
"""
