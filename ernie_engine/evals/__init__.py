"""Accuracy of a model on questions with known answers: scorers, intervals, transports and reports,
each apart.

Nothing here imports the engine or torch: whatever answers (an engine, a URL, another library) is
handed in.
"""
