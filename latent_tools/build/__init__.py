"""Filling a cache: plan, decode, encode, write, finish."""
