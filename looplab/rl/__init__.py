"""Reinforcement learning with TRL: `LoopCreditTrainer`, a `GRPOTrainer` that gives every loop credit for an answer.

It may import what lies below the verbs, and needs the extra `rl`.
"""
