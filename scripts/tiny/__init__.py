"""Everything that makes ernie-tiny: its closed world, its tasks, its tokenizer, its training and
its files.

The data side (world, sample, arithmetic, knowledge, context, tasks, tokenizer, corpus) never
imports torch, so that data workers start in a moment; only model, training, checking, export and
faults do.
"""
