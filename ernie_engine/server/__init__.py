"""The OpenAI-compatible server: an engine process, and an HTTP front end in a process of its own.

The two exchange length-checked frames (wire.py) over a socket pair and share nothing else.
"""
