"""The decoders, one a file: the name that `sampling.decoder` gives, and how it answers."""
