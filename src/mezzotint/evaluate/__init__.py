"""Numbers that say how they were made: features, metrics, references, protocols.

Reading order: `metrics` (what is computed), `inception` and `features` (on what), `pixels` (from which bytes),
`references` (against what), `card` (under which protocol), `run` (all of it on a folder, a file or a model).
"""
