"""Fused attention: what it computes, as data, and the programs that compute it."""
