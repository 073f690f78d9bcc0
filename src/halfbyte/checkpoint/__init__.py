"""Tensors on disk: read with every length checked, written whole or not at all."""
