"""The command line, benchmarks and training recipes."""
