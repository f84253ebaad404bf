"""How the test run checks annotations: a whole number is also a float, as Python's typing rules say."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
