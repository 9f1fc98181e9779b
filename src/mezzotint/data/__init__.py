"""Pictures in, uint8 tensors out. Read `images` first, then `order` and `loader`; `prepare` writes a set once resized.

`pixels` turns one picture into pixels, `sources` and `tables` know where pictures lie, `builtin` and `shapes` are sets
that need no download, `audit` says what is wrong with a set.
"""
