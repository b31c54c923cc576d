"""The contract on disk: layout, atomic commit, manifest, fingerprints, random-access reading.

Nothing else in Carrara writes a shard or trusts one. Modules, from the bottom up:

    settings     strict config models, YAML with dotted overrides, the two errors a user sees
    storage      local paths and fsspec URLs: atomic, durable, first-writer-wins writes
    fingerprint  what the bytes of a shard depend on, as a hash that can say what changed
    layout       where everything of a run lies, and how shards and samples are named
    dataset      commit a shard, judge a shard, write and open a manifest
    images       image shards: reproducible WebDataset tars, random-access reading
    columns      latent and feature shards: safetensors columns
    stage        what a stage is: tasks, worker, finish
    progress     the bar a person sees and the status file that `carrara status` reads
"""
