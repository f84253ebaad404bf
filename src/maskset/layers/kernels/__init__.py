"""Deformable attention, computed in several ways: see `maskset.layers.deformable`, which chooses."""
