"""Sound to tokens: spectrograms, their augmentation, and the CED encoder."""
