"""Tests on a real Slurm cluster, which cluster.py starts on this machine."""
