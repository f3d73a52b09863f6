"""Which CPU kernels multiply which matrices of a file."""
