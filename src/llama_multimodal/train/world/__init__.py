"""Training the embedded model from nothing, on pictures that the renderer makes up."""
