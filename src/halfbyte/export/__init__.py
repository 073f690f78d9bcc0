"""Leaving: merging adapters into plain checkpoints."""
