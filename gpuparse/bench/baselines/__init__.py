"""The methods of the reference, written anew: what gpuparse is measured against."""
