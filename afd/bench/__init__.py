"""How fast afd is, measured beside what else could do the same work: ``afd bench``."""
