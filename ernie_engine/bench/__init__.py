"""Measuring: a workload, who answers it (an engine in this process, or a URL), and the figures by
the field's definitions. Never part of serving.
"""
