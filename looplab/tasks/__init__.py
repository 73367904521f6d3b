"""Tasks: what a model is trained on and measured by. Each is one object with the same verbs.

base.py, card.py and training.py hold what every task needs; they may import instruments and what lies below. A folder
per task: hops and language stand on these files, text and molecules on language. registry.py, on top, knows all tasks.
"""
