"""Attention block by block."""
