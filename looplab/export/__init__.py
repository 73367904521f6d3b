"""Write a looped model for the engines where people run models: llama.cpp, MLX, and whatever loads a stock model.

It may import tasks/registry.py and what lies below.
"""
