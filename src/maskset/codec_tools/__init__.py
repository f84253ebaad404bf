"""Fitting and comparing mask codecs on the masks of a data set (`maskset codecs fit` and `compare`)."""
