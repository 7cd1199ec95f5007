"""What a LoRA is: its value, its file format, its store and registry, and how to train one.

Knows nothing of servers, requests or HTTP.
"""
