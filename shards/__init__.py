"""The contract on disk: layout, atomic commit, manifest, fingerprints, random-access reading.

Nothing else in Carrara writes a shard or trusts one. Modules, from the bottom up:

    settings     strict config models, YAML with dotted overrides, the two errors a user sees
    local        files on a local file system: durable, swept where their writer is dead
    storage      local paths and fsspec URLs: atomic, durable writes, and create-if-absent
    machine      whether an error says that something is wrong with this machine
    fingerprint  what the bytes of a shard depend on, as a hash that can say what changed
    layout       where everything of a run lies, and how shards and samples are named
    listing      which shards of a folder are committed and which begun, by names alone
    protocol     how a shard is committed, taken over and blanked, as steps that a model checker explores
    commit       what a folder is made with, and those steps on real stores
    exclusions   which samples are not to be used: one file, read a row group at a time
    dataset      stats, write and open a manifest
    images       image shards: reproducible WebDataset tars, random-access reading
    columns      latent and feature shards: safetensors columns
    blank        take samples out of a committed shard where they lie
    verify       whether what was committed still lies there
    takeover     folders of format 1
    stage        what a stage is: tasks, worker, finish
    progress     the bar a person sees and the status file that `carrara status` reads
"""
