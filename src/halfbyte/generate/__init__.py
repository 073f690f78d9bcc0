"""Talking: answers to one prompt, to many, and their score."""
