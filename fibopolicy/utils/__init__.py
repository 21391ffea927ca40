"""Helpers for all packages: files, processes, the machine, imports, settings. Imports
none of these packages.
"""
