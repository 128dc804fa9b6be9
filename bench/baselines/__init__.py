"""What gpuparse is measured against: the methods of the reference, written anew."""
