"""`looped fetch`, `looped harness` and `looped frozen`: fetch models, benchmarks and texts, and loop a frozen model.

It may import instruments and what lies below. It knows no task.
"""
