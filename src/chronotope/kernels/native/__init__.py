"""The C++ kernels for CPUs: sources, how they are built, and how they are called."""
