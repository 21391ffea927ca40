"""What all packages share: files, processes, the machine, imports, settings. Imports
none of them.
"""
