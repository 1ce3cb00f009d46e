"""``make demo`` or ``python -m afd.demo``: what a natural and an AFD network are worth under attack."""
