"""Instruments that look into any looped model, whatever its task: recorder, traces, probes, stopwatch, drawing.

They may import runs and what lies below it.
"""
