"""The library inside other frameworks. None of them is a dependency. Each module imports its own framework."""
