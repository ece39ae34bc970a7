"""Modules shared by the training scripts. None of them is a script."""
