"""Image shards to latent shards: VAE posterior moments, CLIP tokens and token embeddings.

config    what a user sets
weights   where an encoder's weights lie, and their digests, without loading them
encoders  the VAE and the CLIP, loaded and ready to encode
moments   half-precision means, 8-bit log-stds, per-channel statistics that merge
buckets   aspect-ratio buckets, and which one an image goes to
resize    resize and crop of one image, decoding ahead of the encoder
stage     the whole run: its settings, tasks and accounting
worker    one image shard in, one latent shard out: source says what is in the one, encoding takes its images through
          the VAE in batches, columns lays samples out, sidecar says what became of each row
planning  what pre-encoding would store, take and cost
inspection  latents decoded beside their originals, and encoded again
"""
