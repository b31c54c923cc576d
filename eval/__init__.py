"""A checkpoint to numbers and a page: generated shards, features, metrics with their errors, a report.

config        what a user sets
protocol      how a number was measured, with a short id; unlike protocols are never compared
prompts       the captions that are drawn: of held-out pictures, or of a text file
checkpoints   which weights are evaluated, and their digests
generate      prompts to pictures, with noise that depends on the prompt and the replicate alone
stage         the two stages: the held-out pictures' features (reference), the generated shards
moments       count, mean, scatter in float64: merge, un-merge
estimate      jackknife, cluster and Wilson errors
frechet       Frechet distance, its error and its bias
clipscore     CLIP score and raw cosine
retrieval     a picture's caption among a hundred
faithfulness  does the picture show what its caption says (where a corpus has a judge)
encoders      the VAE's and the CLIP's own quality on held-out pictures
results       shards to metrics.json
report        one HTML page a checkpoint; history, index
"""
