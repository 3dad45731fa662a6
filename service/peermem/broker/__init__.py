"""Admits work, owns the tables of regions, grants and transfers, and carries commands out."""
