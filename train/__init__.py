"""Fitting models: latent shards into checkpoints, EMA and an exported diffusers pipeline.

One loop (loop.py) on DeepSpeed fits three objectives: the latent diffusion UNet (`train`), and for those
who bring no weights a VAE (`autoencoder`) and a CLIP (`clip`). Modules, from the bottom up:

    config       what a user sets
    order        which sample comes when: a keyed permutation, nothing to save
    randomness   noise, timesteps and dropped captions derived from a sample's place in that order
    diffusion    the forward process, targets and loss weights
    optimizer    AdamW with the EMA as one more optimizer state
    checkpoint   name-keyed safetensors that belong to no world size
    data         shards into batches, ahead of the loop
    objectives   the three models and their losses
    loop         the training loop
    finish       what a finished stage leaves: a model folder and its marker
    main         the command
    export       checkpoint into StableDiffusionPipeline
"""
