"""Triton kernels, as functions of plain tensors. They know no cache and no policy.

Beside each kernel its twin in plain torch is named; a test holds them together. ``launch.serve`` says where they run.
"""
