"""Image shards to latent shards: VAE posterior moments, CLIP tokens and token embeddings.

config    what a user sets
weights   where an encoder's weights lie, and their digests, without loading them
encoders  the VAE and the CLIP, loaded and ready to encode
moments   half-precision means, 8-bit log-stds, per-channel statistics that merge
buckets   aspect-ratio buckets, and which one a picture goes to
pictures  resize and crop of one picture, decoding ahead of the encoder
stage     the stage itself: one image shard in, one latent shard out
"""
