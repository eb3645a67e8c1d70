"""Stages, recipes and the command line of saekit."""
