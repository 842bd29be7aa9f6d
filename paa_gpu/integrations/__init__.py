"""The library inside detection frameworks; none of them is a dependency, each module imports its own."""
