"""Show a run to others: model card, upload to the Hub, demo page, server.

It may import tasks/registry.py, hub_cards and what lies below.
"""
