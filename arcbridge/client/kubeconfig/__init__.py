"""Entries of ours in kubeconfig files: written, repaired and removed beside those of others."""
