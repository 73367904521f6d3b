"""`looped bench` and `looped memory`: speed, floating-point operations, and bytes of the KV cache.

It may import tasks/registry.py and what lies below.
"""
