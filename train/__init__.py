"""Fitting models: latent shards into checkpoints, EMA and an exported diffusers pipeline.

One loop (loop.py) on DeepSpeed fits three objectives: the latent diffusion UNet (`train`), and for those
who bring no weights a VAE (`autoencoder`) and a CLIP (`clip`). Modules, from the bottom up:

    config       what a user sets
    order        which sample comes when: keyed permutations and mixtures, nothing to save
    randomness   noise, timesteps and dropped captions derived from a sample's place in that order
    predictions  what a denoiser may predict: targets, solutions, scales
    diffusion    processes, targets, loss weights, timesteps: pure functions
    optimizer    AdamW with the EMAs as further optimizer states
    posthoc      EMA lengths chosen afterwards
    guard        which steps must not be taken
    folders      checkpoint folders and their manifests, without torch
    checkpoint   name-keyed safetensors that belong to no world size
    reader       windows of that order, read ahead; image_samples, latent_samples, latent_file: what is in them
    data         micro-batches, made ahead of the loop
    pipelines    which of diffusers' pipelines a UNet becomes, and which text it reads
    adapters     where a UNet comes from; LoRA and its kin
    objectives   what the loop can fit: the VAE's and the CLIP's losses
    denoising    the UNet's loss
    inversion    a new word's loss
    engine       DeepSpeed around an objective
    validation   the loss on held-out images, early stopping
    journal      the log, TensorBoard, events
    loop         the training loop
    finish       what a finished stage leaves: a model folder and its marker
    main         the command
    export       checkpoint into a diffusers pipeline
    samples      grids of images while training
"""
