"""Meta-World's tasks. Importing this package imports neither Meta-World nor MuJoCo."""
