"""A run folder: plain files, what they say, and how they are written whole.

It may import modeling_looped, data_builders and mistakes.py. It knows no task.
"""
