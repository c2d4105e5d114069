"""Measuring what the backends are told of a machine: Triton's configurations, the order of the backends.

What ``dense-ext tune`` runs, with the clocks and the cases of :mod:`dense_ext.benchmark`.
"""
