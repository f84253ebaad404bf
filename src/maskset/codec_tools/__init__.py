"""What `maskset codecs fit` and `maskset codecs compare` do: mask codecs on the masks of a data set."""
