"""Training data: images, or latents of an autoencoder, by index and in batches.

Read `dataset` first (the interface), then `image_dataset`, `shuffle` and `loader`. `sources`,
`tables`, `builtin` and `shapes` are where images come from, and `transforms` turns one image into
pixels. `prepare` writes a dataset resized, `encode_latents` its latents, and `audit` lists what
is wrong with it. `prepare_shards` writes it for an object store, in the form of `shard_format`.
`autoencoder` holds the codecs, `text_encoder` and `caption_embeddings` the
captions.
"""
