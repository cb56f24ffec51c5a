"""The benchmarks of the command `bench`: the programs that it measures, and how it measures them."""
