"""The checker of annotations under pytest: beartype, with int accepted where float is written, as Python's typing has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
