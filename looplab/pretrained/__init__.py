"""Pretrained models looped without training, and what is fetched for them: models, benchmarks, corpora.

It may import instruments and what lies below. It knows no task.
"""
