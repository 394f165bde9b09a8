"""A C++ test of the CPU loops, which needs neither torch nor Python to run."""
