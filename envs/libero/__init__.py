"""LIBERO's tasks. Importing this package imports neither LIBERO nor MuJoCo."""
