"""Numbers that say how they were made: features, metrics, references, protocols.

Reading order: `metrics` (what is computed; then `neighbours`, `kid`, `bootstrap`), `inception` and `features` (on
what), `pixels` (from which bytes), `sources` (of which images), `references` (against what), `card` (under which
protocol), `collect` (in pieces, on all ranks), `run` (all of it), `copies` (is it new).
"""
