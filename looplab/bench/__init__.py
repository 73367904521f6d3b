"""`looped bench` and `looped memory`: speed, operations and bytes.

It may import tasks/registry.py and what lies below.
"""
