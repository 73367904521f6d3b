"""A run folder: the files in it, how they are read and checked, and how they are written whole.

It may import modeling_looped, data_builders and mistakes.py. It knows no task.
"""
