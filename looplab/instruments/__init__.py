"""Instruments that look into any model: recorder, traces, probes, stopwatch, drawing.

They may import runs and what lies below it. They know no task.
"""
